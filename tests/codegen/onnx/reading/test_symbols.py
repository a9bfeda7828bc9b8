"""Sizes as a file has them: numbers, names, and what torch's exporter writes about slices."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from attnc.codegen.onnx.reading.symbols import Symbols


def size(symbols: Symbols, text: str) -> str:
    return symbols.text(symbols.of(ir.SymbolicDim(text)))


def test_a_bound_that_cannot_bind_vanishes() -> None:
    symbols = Symbols((), {})
    assert size(symbols, "1 - Max(0, 1 - n)") == "1"
    assert not symbols.assumed, "a size is 2 or more"


def test_a_bound_that_may_bind_is_an_assumption() -> None:
    symbols = Symbols((), {})
    assert size(symbols, "512 - Max(0, 512 - n)") == "n"
    assert list(symbols.assumed) == ["0 <= 512 - n"]
    assert size(symbols, "Min(n, 700)") == "n"
    assert list(symbols.assumed) == ["0 <= 512 - n", "n <= 700"]


@pytest.mark.parametrize("text", ["Floor(n)", "Max(n)", "Max(n, 2, 3)", "n +", "n if n else 2"])
def test_what_is_no_sum_of_names_is_a_name_of_its_own(text: str) -> None:
    assert size(Symbols((), {}), text) == text
