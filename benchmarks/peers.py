"""The corpus' peers where its spellings or its checks do not reach them yet: adapters, no matchers.

The counting and the checking of ONNX files is the corpus' own (``zoo.tools_onnx``), which has to be on the
path.  A tool of the spellings takes ``(module, args)`` and returns one dict per recognised site; a tool of
the zoo takes ``(model, inputs, info)`` and returns how many sites it fused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch


class _ByName(torch.nn.Module):
    """A case of the spellings with named inputs, as the ONNX tools feed them."""

    def __init__(self, case: torch.nn.Module) -> None:
        super().__init__()
        self.case = case

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.case(*inputs.values())


def _as_spelling(
    tool: Callable[..., int], module: torch.nn.Module, args: tuple[Any, ...]
) -> list[dict[str, Any]]:
    info: dict[str, Any] = {}
    inputs = {f"x{i}": x for i, x in enumerate(args)}
    count = tool(_ByName(module).eval(), inputs, info)
    site = {"status": "rewritten", "spec": "fused ONNX operator", "mask": "", "reason": "", **info}
    return [site] * count


def spelling_inductor(module: torch.nn.Module, args: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Count what Inductor's matcher fuses in a spelling, with code generation cut off as in the zoo."""
    from zoo.tools import inductor

    site = {"status": "rewritten", "spec": "sdpa pattern", "mask": "", "reason": ""}
    return [site] * inductor(module, args)


def spelling_ort_fusions(module: torch.nn.Module, args: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Run onnxscript's ort_fusions on a spelling."""
    from zoo.tools_onnx import ort_fusions

    return _as_spelling(ort_fusions, module, args)


def spelling_ort_optimizer(module: torch.nn.Module, args: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Run ONNX Runtime's transformers optimizer on a spelling: the best of its model types."""
    return _as_spelling(ort_optimizer, module, args)


def ort_optimizer(model: torch.nn.Module, inputs: dict[str, Any], info: dict[str, Any]) -> int:
    """Run the corpus' ``ort_optimizer``, and check the best file it made as ``ort_fusions`` is checked."""
    from onnxruntime.transformers import optimizer
    from zoo import tools_onnx

    made: list[tuple[int, Any]] = []
    optimize = optimizer.optimize_model

    def noted(*args: Any, **kwargs: Any) -> Any:
        out = optimize(*args, **kwargs)
        made.append((tools_onnx._count(out.nodes()), out))
        return out

    with mock.patch.object(optimizer, "optimize_model", noted):
        count: int = tools_onnx.ort_optimizer(model, inputs)
    if count:
        best = next(m for n, m in made if n == count)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "best.onnx"
            best.save_model_to_file(str(file))
            tools_onnx._verify(model, inputs, str(file), info)
    return count
