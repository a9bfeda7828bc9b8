"""Sizes as a file has them: numbers, names, and what torch's exporter writes about slices."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from attnc.codegen.onnx.reading.symbols import EqualSizesError, Multiple, Symbols


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


def test_a_sum_of_one_size_that_must_be_a_number_says_the_size() -> None:
    symbols = Symbols((), {})
    n, m = symbols.named("n"), symbols.named("m")
    with pytest.raises(EqualSizesError, match=r"^n = 8$"):
        symbols.require_equal(3 * n - 2, 22)
    symbols.require_equal(3 * n - 2, 21)  # no whole number
    symbols.require_equal(n - 2, m)  # two sizes


def test_a_quotient_times_its_divisor_is_exact() -> None:
    symbols = Symbols((), {})
    b, n = symbols.named("b"), symbols.named("n")
    symbols.require_same_product([b, n], [b, n // 8, 4])
    with pytest.raises(EqualSizesError, match=r"^n = 8 \* \(n/8\)$"):
        symbols.require_same_product([b, n], [b, n // 8, 8])
    again = Symbols((), {"n": Multiple(8, "n/8"), "n/8": 3})
    assert again.named("n") == 24
