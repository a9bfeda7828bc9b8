"""Open ONNX files that nobody vouches for: bytes, paths, tensors, graphs and functions are checked first."""
