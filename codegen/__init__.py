"""Backends: how a plan becomes graph nodes, kernels or ONNX."""

if __name__ != "attnc.codegen":
    raise ImportError("import attnc.codegen, not the folder: see CONTRIBUTING.md")
