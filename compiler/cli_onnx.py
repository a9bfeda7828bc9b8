"""What the verbs of the command line do with ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnc.errors import RewriteError
from attnc.report.report import Report

DEFAULT = "ort-cpu"


def is_onnx(model: str) -> bool:
    """Say whether a model argument is an ONNX file, by its name."""
    return model.endswith(".onnx")


def check_options(model: str, **given: Any) -> None:
    """See that no option is given that has no meaning for an ONNX file.

    Raises:
        RewriteError: one is.
    """
    for name, value in given.items():
        if value:
            raise RewriteError(
                f"{model}: --{name} has no meaning for an ONNX file: sites become the target's operators"
            )


def inspect_file(model: str, target: str | None) -> Report:
    """Return what would be done with an ONNX file.

    Raises:
        CodegenError: as ``attnc.onnx_file.inspect_onnx``.
    """
    from attnc.onnx_file import inspect_onnx

    return inspect_onnx(model, target=target or DEFAULT)


def rewrite_file(model: str, output: Path, target: str | None, **options: bool) -> Report:
    """Rewrite an ONNX file and return the report.

    Raises:
        CodegenError: as ``attnc.onnx_file.rewrite_onnx``.
    """
    from attnc.onnx_file import rewrite_onnx

    return rewrite_onnx(model, output, target=target or DEFAULT, **options).report
