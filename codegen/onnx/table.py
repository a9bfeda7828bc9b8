"""Choose an operator for a site from a table of what a runtime was measured to run.

The tables are data: ``capabilities/<target>-<version>.json``, rows in the order of preference.  A row names
conditions; each is a function here that returns None if the site meets it, else why not.  A site that no row
fits is written as basic operators.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from attnc.codegen.onnx.sites import HIDES, Call
from attnc.errors import CodegenError

Target = Literal["ort-cpu", "standard", "standard-23"]
TARGETS: tuple[Target, ...] = ("ort-cpu", "standard", "standard-23")

Condition = Callable[[Call], str | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One operator that a runtime has, and when it may be used."""

    operator: str
    domain: str
    opset: int
    dtypes: tuple[str, ...]
    conditions: tuple[str, ...]

    @property
    def name(self) -> str:
        """The operator with its domain."""
        return f"{self.domain or 'ai.onnx'}.{self.operator}"

    def refuses(self, call: Call) -> str | None:
        """Return why the row does not fit the site, None if it does."""
        dtype = str(call.dtype).removeprefix("torch.")
        if dtype not in self.dtypes:
            return f"no {dtype} kernel"
        for name in (*ALWAYS, *self.conditions):
            why = CONDITIONS[name](call)
            if why:
                return why
        return None


@dataclass(frozen=True, slots=True)
class Table:
    """What one version of a runtime runs.  ``note`` says whether it was measured on the installed version."""

    name: str
    opset: int
    rows: tuple[Row, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The row chosen for a site (None: basic operators) and why."""

    row: Row | None
    reason: str


def candidates(call: Call, table: Table) -> list[Choice]:
    """Return the rows of ``table`` that fit ``call``, in order, then basic operators, which always do."""
    out, whys = [], dict[str, None]()
    for row in table.rows:
        why = row.refuses(call)
        if why is None:
            out.append(Choice(row, "; ".join(whys) if whys else "first choice of the table"))
            whys[f"{row.name}: tried before"] = None
        else:
            whys[f"{row.name}: {why}"] = None
    return [*out, Choice(None, "; ".join(whys) if whys else "the target has basic operators alone")]


def load(target: Target, installed: str | None = None) -> Table:
    """Return the table of ``target``; for a runtime the one measured nearest below ``installed``.

    ``installed`` is a version such as 1.31.1.

    Raises:
        CodegenError: an unknown target.
    """
    if target not in TARGETS:
        raise CodegenError(f"ONNX export: expected a target of {TARGETS}, found {target!r}")
    if target != "ort-cpu":
        return _read("standard-18" if target == "standard" else target)
    folder = resources.files("attnc.codegen.onnx.capabilities")
    measured = sorted(
        _key(f.name.removesuffix(".json")) for f in folder.iterdir() if f.name.startswith("ort-cpu-")
    )
    wanted = _key(f"ort-cpu-{installed}")[:2] if installed else measured[-1]
    nearest = max((m for m in measured if m <= wanted), default=measured[0])
    name = "ort-cpu-" + ".".join(map(str, nearest))
    note = "" if nearest == wanted else f"{name} is the nearest table to the installed {installed}"
    return _read(name, note)


def _key(name: str) -> tuple[int, ...]:
    """Return the version in ``ort-cpu-1.31`` as numbers."""
    parts = name.removeprefix("ort-cpu-").split(".")
    return tuple(int(p) for p in parts if p.isdigit())


def _read(name: str, note: str = "") -> Table:
    text = (resources.files("attnc.codegen.onnx.capabilities") / f"{name}.json").read_text(encoding="utf-8")
    data = json.loads(text)
    rows = tuple(
        Row(r["operator"], r["domain"], r["opset"], tuple(r["dtypes"]), tuple(r["conditions"]))
        for r in data["rows"]
    )
    return Table(name, data["opset"], rows, note)


def _no_lse(call: Call) -> str | None:
    return "the log-sum-exp is used" if call.lse_used else None


def _scores_fold(call: Call) -> str | None:
    folded = call.folded()
    return folded if isinstance(folded, str) else None


def _one_dtype(call: Call) -> str | None:
    found = {o.dtype for o in (call.spec.q, call.spec.k, call.spec.v)}
    return None if len(found) == 1 else "q, k and v differ in type"


def _fill_hides(call: Call) -> str | None:
    """A replaced score must weigh nothing beside a visible key, for it is written as an added one."""
    fill = call.spec.fill
    return f"the fill {fill.value} does not hide" if fill.how == "replace" and fill.value > HIDES else None


def _fill_in_range(call: Call) -> str | None:
    """No finite number of half precision swallows a score, so a row that sees no key would not be uniform."""
    half = str(call.dtype).removeprefix("torch.") in ("float16", "bfloat16")
    if half and math.isfinite(call.spec.fill.value) and call.may_see_nothing():
        return "rows that see no key would not be uniform in half precision"
    return None


def _no_causal_attribute(call: Call) -> str | None:
    split = call.split(windows=True, unequal=False)
    return "causal" if split.band is not None or split.guarded is not None else None


def _sizes_known(call: Call) -> str | None:
    varying = [n for n in (*call.heads, *call.head_sizes) if not isinstance(n, int)]
    return f"the number or the size of the heads varies: {', '.join(map(str, varying))}" if varying else None


def _equal_heads(call: Call) -> str | None:
    return (
        None
        if call.heads[0] == call.heads[1]
        else f"{call.heads[0]} query heads share {call.heads[1]} key heads"
    )


def _no_softcap(call: Call) -> str | None:
    folded = call.folded()
    return "no softcap there" if not isinstance(folded, str) and folded.softcap else None


def _no_sink(call: Call) -> str | None:
    return None if call.spec.norm.sink is None else "no sink there"


def _self_lengths(call: Call) -> str | None:
    return None if call.is_self else f"Sq {call.lengths[0]} is not Sk {call.lengths[1]}"


def _equal_head_sizes(call: Call) -> str | None:
    qk, v = call.head_sizes
    return None if qk == v else f"head sizes {qk} and {v} differ"


def _multiple_of_8(call: Call) -> str | None:
    size = call.numbers[2]
    return None if size % 8 == 0 else f"head size {size} is no multiple of 8"


def _no_added_bias(call: Call) -> str | None:
    folded = call.folded()
    biased = not isinstance(folded, str) and folded.biases and call.spec.norm.sink is None
    return "a bias may hold rows of -inf" if biased else None


def _no_empty_rows(call: Call) -> str | None:
    """A sink is written as a key that every query sees."""
    empty = call.may_see_nothing() and call.spec.norm.sink is None
    return "a query may see no key" if empty else None


def _empty_rows_not_nan(call: Call) -> str | None:
    norm, hides = call.spec.norm, call.spec.fill.value == -math.inf
    empty = call.may_see_nothing() and hides and not norm.safe and norm.sink is None
    return "a query that sees no key must give NaN" if empty else None


ALWAYS = ("sizes-known", "no-lse", "scores-fold", "one-dtype", "fill-hides", "fill-in-range")
"""What every fused operator asks for."""

CONDITIONS: Mapping[str, Condition] = {
    "sizes-known": _sizes_known,
    "no-lse": _no_lse,
    "scores-fold": _scores_fold,
    "one-dtype": _one_dtype,
    "fill-hides": _fill_hides,
    "fill-in-range": _fill_in_range,
    "no-causal-attribute": _no_causal_attribute,
    "equal-heads": _equal_heads,
    "no-softcap": _no_softcap,
    "no-sink": _no_sink,
    "self-lengths": _self_lengths,
    "equal-head-sizes": _equal_head_sizes,
    "head-size-multiple-of-8": _multiple_of_8,
    "no-added-bias": _no_added_bias,
    "no-empty-rows": _no_empty_rows,
    "empty-rows-not-nan": _empty_rows_not_nan,
}
