"""The installed runtime against the capability table."""

from __future__ import annotations

import pytest

from attnc.codegen.onnx import probe, runtime
from attnc.codegen.onnx.probe import check_runtime


def test_every_operator_of_the_table_runs_and_agrees() -> None:
    rows = check_runtime()
    assert rows[0].operator == "onnxruntime"
    assert {r.operator for r in rows} >= {
        "com.microsoft.MultiHeadAttention",
        "com.microsoft.GroupQueryAttention",
        "ai.onnx.Attention",
        "basic operators",
        "ai.onnx.MatMulInteger",
    }
    assert [r for r in rows[1:-1] if not r.ok] == []


def test_another_version_is_said_to_be_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "version", lambda: "1.99.0")
    first = check_runtime()[0]
    assert (first.expected, first.found, first.ok) == ("ort-cpu-1.31", "1.99.0", False)


def test_missing_runtime_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from attnc.errors import CodegenError

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(CodegenError, match="install onnxruntime"):
        runtime.version()
