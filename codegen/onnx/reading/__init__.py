"""Read an ONNX graph into an fx graph of ATen calls on fake tensors, so that the detector can look at it.

``read`` is the door.  Each ONNX operator has one small function, by name in the ``RULES`` of the file of its
kind; integer shape arithmetic is worked out to numbers and symbolic sizes (``known``); an operator without a
rule becomes an opaque call with the shape that the file says it has.  Nothing fails because of one operator.
"""

from attnc.codegen.onnx.reading.read import Reading, read

__all__ = ["Reading", "read"]
