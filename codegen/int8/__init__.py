"""Integer linear layers for CPU."""

from attnc.codegen.int8.linear import W8A8Linear, linear_w8a8
from attnc.codegen.int8.swap import prepare_modules, quantize_modules

__all__ = ["W8A8Linear", "linear_w8a8", "prepare_modules", "quantize_modules"]
