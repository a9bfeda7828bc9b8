"""Run models in the installed ONNX Runtime, on the CPU provider, with nothing printed.

The ``onnxruntime`` and ``onnxruntime-gpu`` wheels behave alike here: the provider is named, never taken from
the list of available ones, and the private kernel table (which crashes in one of them) is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnc.errors import CodegenError

if TYPE_CHECKING:
    import onnx_ir as ir

PROVIDER = "CPUExecutionProvider"


def version() -> str:
    """Return the version of the installed ONNX Runtime.

    Raises:
        CodegenError: none is installed.
    """
    try:
        import onnxruntime
    except ImportError as e:
        raise CodegenError(
            f"ONNX Runtime cannot be imported ({e}); install onnxruntime or onnxruntime-gpu"
        ) from e
    return str(onnxruntime.__version__)


class Session:
    """A loaded model: call it with a mapping of input names to tensors, get its outputs in order."""

    def __init__(self, model: ir.Model | Path, *, optimized: bool = True) -> None:
        import onnx_ir as ir
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
        self._session = onnxruntime.InferenceSession(source, options, providers=[PROVIDER])
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.outputs = [o.name for o in self._session.get_outputs()]

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run the model; inputs it does not have are left out.

        Raises:
            CodegenError: an input is missing.
        """
        missing = [n for n in self.inputs if n not in feeds]
        if missing:
            raise CodegenError(f"ONNX Runtime: expected inputs {self.inputs}, found none for {missing}")
        values = {n: _to_ort(feeds[n]) for n in self.inputs}
        return [_from_ort(x) for x in self._session.run_with_ort_values(self.outputs, values)]


def _to_ort(x: torch.Tensor) -> Any:
    import onnxruntime

    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        bits = x.view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())


def _from_ort(value: Any) -> torch.Tensor:
    if value.data_type() == "tensor(bfloat16)":
        return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).clone()
    return torch.from_numpy(value.numpy().copy())


def failures() -> tuple[type[Exception], ...]:
    """Return the errors with which ONNX Runtime refuses a model or a run."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NotImplemented",
        "RuntimeException",
        "EPFail",
    )
    return tuple(getattr(state, n) for n in names if hasattr(state, n))
