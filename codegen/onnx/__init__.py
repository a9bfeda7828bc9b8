"""Lower plans to ONNX operators by capability table."""
