"""One expression for several equals each of them at its number."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attnc import expr as E
from attnc.expr import Expr
from attnc.passes.detect.lifting import lift

A, K = E.index("a", E.integer(4)), E.index("k", E.size("s"))
FAMILIES: dict[str, Callable[[int], Expr]] = {
    "constant": lambda i: A,
    "step": lambda i: E.add(E.mul(E.integer(4 * i + 2), E.ONE), A),
    "symbolic step": lambda i: E.add(E.mul(E.integer(i), E.size("s")), K),
    "every other": lambda i: E.integer(i // 2),
    "over again": lambda i: E.integer(i % 2),
    "two digits": lambda i: E.integer(5 * (i // 2) + 3 * (i % 2)),
    "causal": lambda i: E.le0(E.sub(K, E.add(A, E.integer(4 * i)))),
    "load": lambda i: E.load("m", (E.integer(i), A), "bool"),
    "both": lambda i: E.and_(E.le0(E.sub(K, A)), E.load("m", (E.integer(i), A), "bool")),
    "neither": lambda i: E.not_(E.load("m", (E.integer(i),), "bool")),
    "choice": lambda i: E.where(E.load("m", (E.integer(i),), "bool"), E.real(0.0), E.real(-1.0)),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_lifted_expression_is_each_of_them_at_its_number(family):
    n = E.index("u0", E.integer(4))
    lifted = lift([family(i) for i in range(4)], n)
    assert lifted is not None
    for i in range(4):
        assert E.substitute(lifted, {E.indices(n)[0]: E.integer(i)}) == family(i)


@pytest.mark.parametrize(
    "several",
    [
        [E.integer(i) for i in (0, 1, 3)],
        [E.integer(i) for i in (0, 2, 1)],
        [E.real(0.5), E.real(0.25)],
        [E.load("m", (A,), "bool"), E.load("n", (A,), "bool")],
        [E.le0(E.sub(K, A)), E.not_(E.load("m", (A,), "bool"))],
        [E.call("exp", E.real(1.0)), E.call("exp", E.real(2.0))],
    ],
)
def test_what_follows_no_rule_is_not_lifted(several):
    assert lift(several, E.index("u0", E.integer(len(several)))) is None
