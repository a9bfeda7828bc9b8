"""Symbolic integers and predicates agree with Python on every value that their variables may have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from attnc import expr as E
from attnc.expr import Expr

LENGTHS = {"n": st.integers(1, 6), "m": st.integers(1, 4)}
STATIC = 5
INDICES = {
    "i": E.index("i", E.integer(STATIC)),
    "j": E.index("j", E.size("n")),
    "k": E.index("k", E.mul(E.size("n"), E.size("m"))),
}


@dataclass(frozen=True)
class Pair:
    """A symbolic value and the same computed in Python, given the values of variables."""

    expr: Expr
    value: Callable[[dict[str, int]], int | bool]


def evaluate(e: Expr, env: dict[str, int]) -> int | bool:
    """Compute a symbolic value from the values of its variables."""
    if e.op == "poly":
        return sum(c * product(evaluate(g, env) for g in m) for m, c in E.terms(e))
    if e.op in ("index", "size"):
        return env[e.args[0]]
    if e.op in ("true", "false"):
        return e.op == "true"
    args = [evaluate(a, env) for a in (e.args[0] if e.op in ("and", "or") else e.args)]
    table = {
        "floordiv": lambda a, b: a // b,
        "mod": lambda a, b: a % b,
        "le0": lambda a: a <= 0,
        "eq0": lambda a: a == 0,
        "not": lambda a: not a,
        "where": lambda c, a, b: a if c else b,
        "and": lambda *xs: all(xs),
        "or": lambda *xs: any(xs),
    }
    return table[e.op](*args)


def product(xs) -> int:
    out = 1
    for x in xs:
        out *= x
    return out


@st.composite
def environments(draw) -> dict[str, int]:
    """Draw sizes, then indices below them."""
    env = {name: draw(size) for name, size in LENGTHS.items()}
    limits = {"i": STATIC, "j": env["n"], "k": env["n"] * env["m"]}
    return env | {name: draw(st.integers(0, limit - 1)) for name, limit in limits.items()}


leaves = st.one_of(
    st.integers(-7, 7).map(lambda c: Pair(E.integer(c), lambda env, c=c: c)),
    st.sampled_from(sorted(INDICES)).map(lambda x: Pair(INDICES[x], lambda env, x=x: env[x])),
    st.sampled_from(sorted(LENGTHS)).map(lambda x: Pair(E.size(x), lambda env, x=x: env[x])),
)
divisors = st.one_of(
    st.integers(1, 6).map(lambda c: Pair(E.integer(c), lambda env, c=c: c)),
    st.sampled_from(sorted(LENGTHS)).map(lambda x: Pair(E.size(x), lambda env, x=x: env[x])),
)


def combined(inner):
    two = st.tuples(inner, inner)
    with_divisor = st.tuples(inner, divisors)
    return st.one_of(
        two.map(lambda p: Pair(E.add(p[0].expr, p[1].expr), lambda env: p[0].value(env) + p[1].value(env))),
        two.map(lambda p: Pair(E.sub(p[0].expr, p[1].expr), lambda env: p[0].value(env) - p[1].value(env))),
        two.map(lambda p: Pair(E.mul(p[0].expr, p[1].expr), lambda env: p[0].value(env) * p[1].value(env))),
        with_divisor.map(
            lambda p: Pair(E.floordiv(p[0].expr, p[1].expr), lambda env: p[0].value(env) // p[1].value(env))
        ),
        with_divisor.map(
            lambda p: Pair(E.mod(p[0].expr, p[1].expr), lambda env: p[0].value(env) % p[1].value(env))
        ),
    )


numbers = st.recursive(leaves, combined, max_leaves=6)


def connected(inner):
    two = st.tuples(inner, inner)
    return st.one_of(
        inner.map(lambda p: Pair(E.not_(p.expr), lambda env: not p.value(env))),
        two.map(
            lambda p: Pair(E.and_(p[0].expr, p[1].expr), lambda env: p[0].value(env) and p[1].value(env))
        ),
        two.map(lambda p: Pair(E.or_(p[0].expr, p[1].expr), lambda env: p[0].value(env) or p[1].value(env))),
    )


compared = st.one_of(
    numbers.map(lambda p: Pair(E.le0(p.expr), lambda env: p.value(env) <= 0)),
    numbers.map(lambda p: Pair(E.eq0(p.expr), lambda env: p.value(env) == 0)),
)
predicates = st.recursive(compared, connected, max_leaves=4)


@settings(max_examples=150, deadline=None)
@given(numbers, environments())
def test_polynomials_floor_and_remainder_are_those_of_python(p, env):
    assert evaluate(p.expr, env) == p.value(env)


@settings(max_examples=150, deadline=None)
@given(predicates, environments())
def test_predicates_are_those_of_python(p, env):
    assert evaluate(p.expr, env) == p.value(env)


@settings(max_examples=150, deadline=None)
@given(predicates, numbers, numbers, environments())
def test_where_chooses_as_python_does(c, a, b, env):
    chosen = E.where(c.expr, a.expr, b.expr)
    assert evaluate(chosen, env) == (a if c.value(env) else b).value(env)


@settings(max_examples=150, deadline=None)
@given(numbers, environments(), st.data())
def test_substituting_an_index_is_evaluating_it(p, env, data):
    name = data.draw(st.sampled_from(sorted(INDICES)))
    gone = E.substitute(p.expr, {E.only_index(INDICES[name]): E.integer(env[name])})
    assert all(g.args[0] != name for g in E.indices(gone))
    assert evaluate(gone, env) == p.value(env)


@settings(max_examples=150, deadline=None)
@given(predicates, environments())
def test_what_a_predicate_pins_holds_where_it_is_true(p, env):
    if p.value(env):
        for g, value in E.pinned(p.expr).items():
            assert env[g.args[0]] == E.as_int(value)


@settings(max_examples=150, deadline=None)
@given(numbers, environments(), st.booleans())
def test_a_proof_of_sign_is_true(p, env, upper):
    if E.nonneg(p.expr, upper):
        assert p.value(env) >= 0


@settings(max_examples=150, deadline=None)
@given(numbers, environments())
def test_a_proof_without_upper_bounds_holds_beyond_them(p, env):
    far = env | {name: env[name] + 100 for name in INDICES}
    if E.nonneg(p.expr, upper=False) and not any(g.op in ("floordiv", "mod") for g in E.walk(p.expr)):
        assert evaluate(p.expr, far) >= 0


@settings(max_examples=150, deadline=None)
@given(numbers, numbers, environments())
def test_exact_division_multiplies_back(a, b, env):
    quotient = E.exact_div(a.expr, b.expr)
    if quotient is not None:
        assert evaluate(quotient, env) * b.value(env) == a.value(env)
    if E.terms(b.expr):
        assert E.exact_div(E.mul(a.expr, b.expr), b.expr) is not None or len(E.terms(b.expr)) > 1


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(4)), st.lists(leaves, min_size=4, max_size=4))
def test_order_of_addition_and_multiplication_does_not_matter(order, parts):
    mixed = [parts[i].expr for i in order]
    assert E.add(*mixed) == E.add(*(p.expr for p in parts))
    assert E.product(mixed) == E.product(p.expr for p in parts)


def test_digits_of_an_index_fold_back():
    i = INDICES["i"]
    three = E.integer(3)
    assert E.add(E.mul(three, E.floordiv(i, three)), E.mod(i, three)) == i
    assert E.floordiv(E.add(E.mul(three, INDICES["j"]), E.integer(2)), three) == INDICES["j"]
    assert E.mod(i, E.integer(STATIC)) == i
    assert E.floordiv(INDICES["j"], E.size("n")) == E.ZERO


def test_a_bound_of_the_traced_length_decides_no_comparison():
    i, j = INDICES["i"], INDICES["j"]
    assert E.le0(E.sub(i, E.integer(STATIC))).op == "le0"
    assert E.le0(E.sub(j, E.size("n"))).op == "le0"
    assert E.le0(E.neg(i)) == E.TRUE
    assert E.le0(E.add(i, E.ONE)) == E.FALSE
    assert E.eq0(E.add(j, E.size("n"))) == E.FALSE


def test_a_number_that_may_be_negative_decides_no_comparison():
    passed = E.generator(Expr("opaque", "u0"))
    assert E.le0(E.neg(passed)).op == "le0"
    assert E.le0(E.neg(E.size("n"))) == E.TRUE


def test_arms_of_where_merge_when_the_condition_makes_them_equal():
    i = INDICES["i"]
    at_zero = E.eq0(i)
    assert E.where(at_zero, E.add(i, E.ONE), E.ONE) == E.ONE
    p = E.sub(E.ONE, E.load("mask", (i,), "int"))
    assert E.where(E.not_(E.eq0(p)), E.real(-9.0), p) == E.where(E.not_(E.eq0(p)), E.real(-9.0), E.ZERO)


def test_text_is_readable():
    i, n = INDICES["i"], E.size("n")
    assert str(E.add(E.mul(E.integer(3), i), E.neg(n), E.integer(-2))) == "3*i - n - 2"
    assert str(E.and_(E.le0(i), E.not_(E.eq0(E.floordiv(i, n))))) in (
        "(i <= 0 & ~((i) // (n) == 0))",
        "(~((i) // (n) == 0) & i <= 0)",
    )
    assert str(E.load("mask", (i, E.ZERO), "bool")) == "mask[i, 0]"


# Without attnc's own __init__, which would import torch twice for nothing.
PROGRAM = """
import sys, types
package = types.ModuleType("attnc")
package.__path__ = [sys.argv[1]]
sys.modules["attnc"] = package
from attnc import expr as E
i, n = E.index("i", E.integer(5)), E.size("n")
parts = {E.le0(E.sub(i, n)), E.not_(E.eq0(E.mod(i, n))), E.load("mask", (i, n), "bool"), E.eq0(E.sub(i, n))}
print(E.where(E.and_(*parts), E.real(0.5), E.call("exp", E.real(-1e30))).key)
"""


def test_digests_are_the_same_in_every_process():
    code = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1] / "compiler")]
    runs = [
        subprocess.run(code, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 24


def test_a_pinned_index_stays_in_what_is_read():
    i, n = E.index("i", E.size("n")), E.size("n")
    first, read = E.eq0(i), E.load("ids", (i,), "int")  # a formula cannot read at a place that is a number
    assert {x for x in E.walk(E.where(first, read, n)) if x.op == "load"} == {E.only_generator(read)}
    assert E.where(first, E.add(i, n), E.ONE) == E.where(first, n, E.ONE), "all else is narrowed"


def test_the_greatest_of_sizes_is_known_where_it_is_the_same_for_all_lengths():
    import sympy
    from torch.utils._sympy.functions import Max

    from attnc.sizes import _from_sympy

    s, n = sympy.Symbol("s", positive=True, integer=True), sympy.Symbol("n", positive=True, integer=True)
    assert _from_sympy(s - s * Max(0, 1 - s)) == E.size("s")
    assert _from_sympy(Max(s, n)).args[0][0][0][0].op == "opaque"
