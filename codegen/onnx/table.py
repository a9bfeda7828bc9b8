"""Choose an operator for a site from a table of what a runtime runs.

The tables are data: ``capabilities/<target>-<version>.json``.  A row is an operator: the element types it has
kernels for, what it takes (``WORDS``), conditions (each a function here that returns None if the site meets
it, else why not), and what it costs: its time over that of basic operators (2,048 tokens, 8 heads of 64,
fp32), with and without its causal attribute.  Of the rows that fit, the cheapest comes first.  A site that no
row fits is written as basic operators.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources

import torch

from attnc.codegen.onnx.sites import HIDES, Call, Folded, Split
from attnc.errors import CodegenError
from attnc.masks import Full

Target = str
"""A family of tables, or one with a version: ``ort-cpu``, ``standard-23``."""
FAMILIES = ("ort-cpu", "ort-cuda", "standard")
TARGETS = ("ort-cpu", "ort-cuda", "standard", "standard-23", "standard-24")
"""The targets with a table of their own, as they are listed to a user."""
STANDARD = "18"
"""The version of ``standard``: what every exporter and runtime of today has."""

WORDS: Mapping[str, str] = {
    "full": "causal alone there",
    "causal": "no causal attribute there",
    "causal-unequal": "its causal attribute means another mask where Sq is not Sk",
    "window": "no window there",
    "softcap": "no softcap there",
    "sink": "no sink there",
    "sink-key": "no sink there",
    "bias": "no bias there",
}
"""What an operator may take beside q, k, v and a scale, and what is said of one that does not.

``sink-key`` is a sink written as one more key, beside which the whole mask is in the bias.
"""

Condition = Callable[[Call], str | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One operator that a runtime has, when it may be used, and what it costs.

    ``projecting`` is the operator, for float32, that does the same on one input and also multiplies it with
    the stored weights of the projections to q, k and v.  ``measured`` False: it comes from what the runtime
    publishes, and was not run.
    """

    operator: str
    domain: str
    opset: int
    dtypes: tuple[str, ...]
    takes: tuple[str, ...]
    conditions: tuple[str, ...]
    cost: Mapping[str, float] = field(default_factory=dict, hash=False)
    measured: bool = True
    projecting: str = ""

    @property
    def name(self) -> str:
        """The operator with its domain."""
        return f"{self.domain or 'ai.onnx'}.{self.operator}"

    def projects(self, dtype: torch.dtype) -> bool:
        """Say whether there is such an operator for the element type."""
        return bool(self.projecting) and dtype == torch.float32

    def refuses(self, call: Call) -> str | None:
        """Return why the row does not fit the site, None if it does."""
        dtype = str(call.dtype).removeprefix("torch.")
        if dtype not in self.dtypes:
            return f"no {dtype} kernel"
        for name in (*ALWAYS, *self.conditions):
            why = CONDITIONS[name](call)
            if why:
                return why
        return next((WORDS[w] for w in self.asks(call) if w not in self.takes), None)

    def asks(self, call: Call) -> tuple[str, ...]:
        """Return the words of what the operator is written with for ``call``, whose scores fold."""
        folded = call.folded()
        assert isinstance(folded, Folded), folded
        split = call.split(windows="window" in self.takes, unequal="causal-unequal" in self.takes)
        sink = call.spec.norm.sink is not None
        as_key = sink and "sink-key" in self.takes
        if as_key:
            split = Split(None, call.spec.mask)
        guarded = split.guarded is not None and "window" in self.takes
        band = split.band
        asked = {
            "full": band is None,
            "causal": band is not None or guarded,
            "causal-unequal": band is not None and not call.is_self,
            "window": band is not None and band.left is not None,
            "softcap": folded.softcap != 0.0,
            "sink": sink and not as_key,
            "sink-key": as_key,
            "bias": bool(folded.biases) or as_key or not isinstance(split.rest, Full),
        }
        return tuple(word for word, is_asked in asked.items() if is_asked)

    def price(self, call: Call) -> float:
        """Return the operator's time for a site that it fits over that of basic operators; 1 if not known."""
        return self.cost.get("causal" if "causal" in self.asks(call) else "full", 1.0)


@dataclass(frozen=True, slots=True)
class Table:
    """What one version of a runtime runs, on which provider, up to which opset.

    ``opset`` is the one to write where no operator needs a later one.  ``note`` says if the table is that of
    another version, or was not measured.
    """

    name: str
    provider: str
    opset: int
    greatest_opset: int
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def family(self) -> str:
        """The name without the version."""
        return self.name.rpartition("-")[0]

    @property
    def is_standard(self) -> bool:
        """The table is that of the standard: operators of ai.onnx, and nothing else."""
        return self.family == "standard"

    @property
    def measured(self) -> bool:
        """Every row was run."""
        return all(row.measured for row in self.rows)


@dataclass(frozen=True, slots=True)
class Choice:
    """The row chosen for a site (None: basic operators) and why."""

    row: Row | None
    reason: str


def candidates(call: Call, table: Table) -> list[Choice]:
    """Return the rows of ``table`` that fit ``call``, the cheapest first; then basic operators, always."""
    whys = {row: row.refuses(call) for row in table.rows}
    fits = sorted((r for r in table.rows if whys[r] is None), key=lambda row: row.price(call))
    said = [f"{row.name}: {why}" for row, why in whys.items() if why]
    out = []
    for row in fits:
        out.append(Choice(row, "; ".join(said) if said else _praise(row, call)))
        said.append(f"{row.name}: tried before")
        if row.projecting:
            out.append(Choice(replace(row, projecting=""), "; ".join(said)))
    return [*out, Choice(None, "; ".join(said) if said else "the target has basic operators alone")]


def _praise(row: Row, call: Call) -> str:
    """Say why a row is chosen that no other one stood before."""
    return f"it takes about {row.price(call):.1f} times as long as basic operators" if row.cost else "it fits"


def load(target: Target, installed: str | None = None) -> Table:
    """Return the table of ``target``, or the one nearest below its version, which its note then says.

    A runtime's version is ``installed``, such as 1.31.1, unless the target names one.

    Raises:
        CodegenError: an unknown target, or a standard older than any table.
    """
    family = next((f for f in FAMILIES if target == f or target.startswith(f"{f}-")), None)
    version = target[len(family) + 1 :] if family else ""
    if family is None or not all(part.isdigit() for part in version.split(".") if version):
        raise CodegenError(f"ONNX export: expected a target of {TARGETS}, found {target!r}")
    known = sorted(_key(name) for name in _names(family))
    wanted = _key(version or (STANDARD if family == "standard" else installed or "")) or known[-1]
    wanted = wanted[: len(known[0])]
    nearest = max((k for k in known if k <= wanted), default=known[0])
    name = f"{family}-{'.'.join(map(str, nearest))}"
    if nearest > wanted and family == "standard":
        raise CodegenError(f"ONNX export: expected a target of {TARGETS}, found {target!r}, which is older")
    asked = target if version else f"the installed {installed}"
    return _read(name, "" if nearest == wanted else f"{name} is the nearest table to {asked}")


def _names(family: str) -> list[str]:
    """Return the versions of a family's tables."""
    folder = resources.files("attnc.codegen.onnx.capabilities")
    names = [f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")]
    return [n.removeprefix(f"{family}-") for n in names if n.rpartition("-")[0] == family]


def within(table: Table, opset: int) -> Table:
    """Return the table for a file that has ``opset``: rows of later standard operators are left out."""
    rows = tuple(replace(r, opset=opset) for r in table.rows if r.domain or r.opset <= opset)
    return replace(table, opset=opset, rows=rows)


def _key(version: str) -> tuple[int, ...]:
    """Return the version 1.31 as numbers."""
    return tuple(int(p) for p in version.split(".") if p.isdigit())


def _read(name: str, note: str = "") -> Table:
    text = (resources.files("attnc.codegen.onnx.capabilities") / f"{name}.json").read_text(encoding="utf-8")
    data = json.loads(text)
    rows = tuple(
        Row(
            r["operator"],
            r["domain"],
            r["opset"],
            tuple(r["dtypes"]),
            tuple(r["takes"]),
            tuple(r["conditions"]),
            r.get("cost", {}),
            r.get("measured", True),
            r.get("projecting", ""),
        )
        for r in data["rows"]
    )
    table = Table(name, data["provider"], data["opset"], data["greatest_opset"], rows, note)
    if table.measured:
        return table
    said = (
        f"{name} is what the runtime publishes and was not measured: sites and file are checked by the CPU "
        f"provider, in float32 where it lacks a kernel; nothing was run on {table.provider}"
    )
    return replace(table, note="; ".join(filter(None, (note, said))))


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
    """No finite number of half precision swallows a score, so a row that sees no key would not be uniform.

    A sink takes all the weight of such a row.
    """
    half = str(call.dtype).removeprefix("torch.") in ("float16", "bfloat16")
    empty = call.may_see_nothing() and call.spec.norm.sink is None
    if half and math.isfinite(call.spec.fill.value) and empty:
        return "rows that see no key would not be uniform in half precision"
    return None


def _sizes_known(call: Call) -> str | None:
    varying = [n for n in (*call.heads, *call.head_sizes) if not isinstance(n, int)]
    return f"the number or the size of the heads varies: {', '.join(map(str, varying))}" if varying else None


def _equal_heads(call: Call) -> str | None:
    return (
        None
        if call.heads[0] == call.heads[1]
        else f"{call.heads[0]} query heads share {call.heads[1]} key heads"
    )


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
    "equal-heads": _equal_heads,
    "self-lengths": _self_lengths,
    "equal-head-sizes": _equal_head_sizes,
    "head-size-multiple-of-8": _multiple_of_8,
    "no-added-bias": _no_added_bias,
    "no-empty-rows": _no_empty_rows,
    "empty-rows-not-nan": _empty_rows_not_nan,
}
