"""Lower plans to scaled_dot_product_attention; importing this registers its two run-time operators."""

from attnc.codegen.sdpa import runtime as _runtime  # noqa: F401
from attnc.codegen.sdpa.lower import as_window, can_run, lower

__all__ = ["as_window", "can_run", "lower"]
