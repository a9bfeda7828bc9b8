"""attnc: find attention in any PyTorch model and rewrite it into checked, faster forms."""

from __future__ import annotations

if __name__ != "attnc":
    raise ImportError("import attnc, not the folder: see CONTRIBUTING.md")

__version__ = "0.1.0"

from attnc.api import emit, export_onnx, inspect, optimize
from attnc.checkpoint import load, save
from attnc.errors import (
    AttncError,
    CaptureError,
    CheckpointError,
    CodegenError,
    RewriteError,
    UnsupportedError,
    VerifyError,
)
from attnc.onnx_file import inspect_onnx, optimize_onnx
from attnc.passes.rewrite.forms import parse_forms
from attnc.passes.rewrite.fuse.fused import Fused
from attnc.passes.rewrite.quant.w8a8 import W8A8
from attnc.passes.rewrite.sparse.chunked import Chunked
from attnc.passes.rewrite.sparse.neighborhood import Neighborhood
from attnc.passes.rewrite.sparse.power import PowerAttention
from attnc.passes.rewrite.sparse.s2 import S2
from attnc.passes.rewrite.sparse.sliding_window import SlidingWindow
from attnc.passes.rewrite.sparse.view_time import ViewTime
from attnc.report.report import Report

__all__ = [
    "S2",
    "W8A8",
    "AttncError",
    "CaptureError",
    "CheckpointError",
    "Chunked",
    "CodegenError",
    "Fused",
    "Neighborhood",
    "PowerAttention",
    "Report",
    "RewriteError",
    "SlidingWindow",
    "UnsupportedError",
    "VerifyError",
    "ViewTime",
    "emit",
    "export_onnx",
    "inspect",
    "inspect_onnx",
    "load",
    "optimize",
    "optimize_onnx",
    "parse_forms",
    "save",
]
