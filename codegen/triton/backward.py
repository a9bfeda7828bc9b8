"""Compute what varies between backward files: the holes of ``templates/bwd.py.j2``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from attnc.codegen.triton import holes, launches, shares, tiles
from attnc.codegen.triton.configs import Config, choose_keys
from attnc.codegen.triton.draws import pull_lines
from attnc.codegen.triton.heads import Part, head_parts
from attnc.codegen.triton.inputs import Input, name_inputs
from attnc.codegen.triton.launches import Call, strides
from attnc.codegen.triton.launches import optional as _optional
from attnc.codegen.triton.launches import row as _row
from attnc.codegen.triton.layout import BACKWARD, Layout
from attnc.codegen.triton.pointwise import number
from attnc.codegen.triton.rows import low, spread_test
from attnc.codegen.triton.slopes import Chain, chain, weigh_slope
from attnc.codegen.triton.steps import WEIGHED, times
from attnc.ir import AttentionSpec, Elementwise, Fill, Normalized, Pointwise, SignedSoftmax

_CONSTANTS = [
    "MASKED: tl.constexpr, UPCAST: tl.constexpr,",
    "BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,",
]
_FLOAT_ROLES = ("bias", "gain", "side", "sink")
_OTHER = {"top": 'float("inf")', "share": "1.0", "delta": "0.0"}


def fill_holes(spec: AttentionSpec, configs: dict[str, Config], layout: Layout = BACKWARD) -> dict[str, Any]:
    """Return the value of every named hole, for a canonical spec and a layout with ``out`` and ``dout``."""
    frame = holes.fill_holes(spec, configs, layout=layout, view=_keys(spec, layout))
    own = _Backward(spec, frame, layout)
    return {
        **frame,
        **launches.row_places(layout),
        **own.heads(),
        **own.pairs(),
        **own.tiles(),
        **own.loops(),
        **own.calls(),
        **own.grads(),
    }


def extra_kernels(spec: AttentionSpec) -> tuple[str, ...]:
    """Return the ends of the names of kernels that only some specs have: over rows, of captured tensors."""
    inputs = name_inputs(spec)
    rows = () if isinstance(spec.norm, Elementwise) else ("rows_kernel",)
    return (*rows, *(f"d_{g.x.name}_kernel" for g in captured_grads(spec, inputs) if g.kind == "summed"))


@dataclass(frozen=True, slots=True)
class Grad:
    """The gradient of a captured tensor that the scores read, and which kernel computes it."""

    x: Input
    at: int

    @property
    def kind(self) -> str:
        """Say what is stored: ``pairs``, ``summed`` pairs, one number per key, or one per query."""
        if set("qk") <= set(self.x.axes):
            return "pairs" if set("bh") <= set(self.x.axes) else "summed"
        return "columns" if "k" in self.x.axes else "rows"


def captured_grads(spec: AttentionSpec, inputs: tuple[Input, ...]) -> list[Grad]:
    """Return the gradients of captured tensors that scores read; ``at`` counts in (q, k, v, *captured)."""
    at = {o.name: 3 + i for i, o in enumerate(spec.captured)}
    return [Grad(x, at[x.operand.name]) for x in inputs if x.role in ("bias", "gain", "side")]


def _keys(spec: AttentionSpec, layout: Layout) -> tiles.View:
    """Return how a tile of queries looks at keys; packed sequences are no documents of each other."""
    return tiles.KEYS if layout.is_packed else tiles.bounded(spec.mask)


def _queries(spec: AttentionSpec, inputs: list[Input], layout: Layout) -> tiles.View:
    """Return how a tile of keys looks at queries.

    A key past the end is in nobody's way unless captured tensors are read there.  A query past the end is a
    row of zeros, whose score an expression could make infinite.
    """
    loads_keys = any(x.per_tile for x in inputs)
    strange = isinstance(spec.norm, WEIGHED) or any(isinstance(s, Pointwise) for s in spec.scores)
    view = tiles.QUERIES if loads_keys else replace(tiles.QUERIES, whole="")
    view = replace(view, runs_over=not strange)
    return view if layout.is_packed else tiles.bounded(spec.mask, view, "reach_k")


class _Backward:
    """What the holes of one spec share."""

    def __init__(self, spec: AttentionSpec, frame: dict[str, Any], layout: Layout) -> None:
        self.spec, self.frame, self.layout = spec, frame, layout
        self.inputs = name_inputs(spec)
        self.pair_inputs = [x for x in self.inputs if x.role != "sink"]
        self.low = low(spec, self.inputs)
        self.refines, self.spread = self.low.refine is not None, spread_test(self.low)
        if isinstance(spec.norm, Normalized):
            self.refines, self.spread = shares.takes_sums_again(spec.norm), shares.spread(spec, spec.norm)
        self.k_parts, self.v_parts = head_parts(spec)
        self.chain: Chain = chain(spec.scores, self.inputs, base2=not isinstance(spec.norm, WEIGHED))
        self.stats = ["top", *(["share"] if self.refines else []), "delta"]
        if isinstance(spec.norm, WEIGHED):
            self.stats = ["share", "delta"] if isinstance(spec.norm, Normalized) else []
        self.found = captured_grads(spec, self.inputs)
        self.keys, self.queries = _keys(spec, layout), _queries(spec, self.pair_inputs, layout)

    def of_kind(self, kind: str) -> list[Grad]:
        return [g for g in self.found if g.kind == kind]

    def names(self, name: str, found: tuple[Part, ...], end: str = "") -> list[str]:
        return [f"{name}{x.tag}{end}" for x in found]

    # ------------------------------------------------------------ what a tile is given

    def heads(self) -> dict[str, Any]:
        """Return the tiles over the head sizes."""
        k, v = self.k_parts, self.v_parts
        held = [(x, "k", "d") for x in k] + [(x, "v", "e") for x in v]
        return {
            "dout_parts": [holes.tile_of(x, "dout", "e", "(rows < sq)[:, None]") for x in v],
            "k_tiles": [holes.tile_of(x, "k", "d", "inside[:, None]") for x in k],
            "v_tiles": [holes.tile_of(x, "v", "e", "inside[:, None]") for x in v],
            "dq_parts": [holes.tile_of(x, "dq", "d", "(rows < sq)[:, None]") for x in k],
            "dk_parts": [holes.tile_of(x, "dk", "d", "(cols < sk)[:, None]") for x in k],
            "dv_parts": [holes.tile_of(x, "dv", "e", "(cols < sk)[:, None]") for x in v],
            "held_tiles": [self._held(*x) for x in held],
        }

    def _held(self, part: Part, name: str, letter: str) -> dict[str, Any]:
        """Return a tile of keys or values that a program holds."""
        feature = f"{letter}{part.tag}"
        address = part.base(f"{name}_at", f"{name}_{letter}" if name == "k" else "v_d")
        stride = f"{name}_d"
        where = f"{address} + j[:, None] * {name}_n + {feature}[None, :] * {stride}"
        return {
            **holes.tile_of(part, name, letter, "(cols < sk)[:, None]"),
            "letter": feature,
            "address": where,
        }

    def captured_terms(self) -> list[str]:
        """Return what a tile is told of captured tensors: addresses, and strides along queries and keys."""
        terms = [t for x in self.pair_inputs for t in (f"{x.name}_at", *_pair_strides(x))]
        return _optional(*terms, *self.frame["places"], *self.frame["seeds"])

    def pairs(self) -> dict[str, Any]:
        """Return the function from contractions to weights and gradients, pair by pair."""
        masks = [x for x in self.pair_inputs if x.role in ("valid", "seen", "ids")]
        scoring = [x for x in self.pair_inputs if x not in masks]
        weights, steep = self._weights()
        pulled = ["s", "p", "ds", *(f"d_{g.x.name}" for g in self.found)]
        given = [_row("s", "dp", *self.stats, "first", "n", "i", "j"), *self.captured_terms(), "sq, sk,"]
        return {
            "pair_inputs": [{"name": x.name, "base": _base(x)} for x in self.pair_inputs],
            "step_pairs": [_pair(x) for x in scoring],
            "mask_pairs": [_pair(x) for x in masks],
            "chain_lines": self.chain.lines,
            "pulls": self.chain.pulls,
            "steep": steep or self.chain.is_steep,
            "weights": pull_lines(self.spec, weights),
            "stops": self.spec.fill.how == "replace",
            "pull_params": [*given, "MASKED: tl.constexpr,"],
            "pull_down": self._pull_args("[:, None]", "[None, :]"),
            "pull_across": self._pull_args("[None, :]", "[:, None]"),
            "pulled": ", ".join(pulled),
            "visited": ", ".join([*self.names("k", self.k_parts), *pulled]),
            "factor": repr(self.chain.factor) if self.chain.factor != 1.0 else "",
            "times_factor": times("", self.chain.factor),
        }

    def _weights(self) -> tuple[list[str], bool]:
        """Return the lines that turn scores into weights, and their gradient into that of the scores."""
        norm = self.spec.norm
        if isinstance(norm, Elementwise | Normalized):
            slope, steep = weigh_slope(norm)
            if isinstance(norm, Normalized):
                slope = shares.slope_lines(slope, again=self.refines)
            return [*self.frame["weigh"], *slope], steep
        share = " * share" if "share" in self.stats else ""
        if isinstance(norm, SignedSoftmax):
            return [
                "sign = tl.where(s > 0.0, 1.0, tl.where(s < 0.0, -1.0, 0.0))",
                's = tl.where(s == float("-inf"), s, tl.abs(s))',
                f"p = tl.exp2(s - top){share} * sign",
                "ds = p * (sign * dp - delta)",
            ], False
        return [f"p = tl.exp2(s - top){share}", "ds = p * (dp - delta)"], False

    def _pull_args(self, rows: str, cols: str) -> list[str]:
        stats = [f"{x}{rows}" for x in self.stats]
        given = _row("s", "dp", *stats, "first", "n", f"i{rows}", f"j{cols}")
        return [given, *self.captured_terms(), "sq, sk, MASKED=MASKED,"]

    def tiles(self) -> dict[str, Any]:
        """Return the parameters of the functions that visit one tile, and their arguments."""
        k, v = self.k_parts, self.v_parts
        visit = [
            _row(*self.names("q", k), *self.names("dout", v), *self.stats, "first", "n"),
            _row(*self.names("k", k, "_at"), "k_n", "k_d", *self.names("v", v, "_at"), "v_n", "v_d"),
            *self.captured_terms(),
            "sq, sk,",
        ]
        captured = [s for x in self.pair_inputs for s in x.strides()]
        across = [
            _row(*self.names("k", k), *self.names("v", v), "b", "h", "first", "n"),
            _row("q_ptr", *strides(self.layout, "q"), "dout_ptr", *strides(self.layout, "dout")),
            *_optional(*(f"{x}_ptr" for x in (*(x.name for x in self.pair_inputs), *self.stats))),
            *_optional(*captured, *self.frame["seeds"]),
            "tokens, q_start, sq, sk," if self.layout.is_packed else "heads, sq, sk,",
        ]
        rows = [f"d_{g.x.name}_sum" for g in self.of_kind("rows")]
        columns = [f"d_{g.x.name}_sum" for g in self.of_kind("columns")]
        stores = [f"d_{g.x.name}_at" for g in self.of_kind("pairs")]
        stores += ["wide"] if stores and self.layout.is_packed else []
        dq_state = [*self.names("dq", k), *rows]
        dkv_state = [*self.names("dk", k), *self.names("dv", v), *columns]
        return {
            "stats": [{"name": x, "other": _OTHER[x]} for x in self.stats],
            "visit_params": [*visit, *_CONSTANTS],
            "visit_args": [*visit, _passed("MASKED")],
            "visit_here": [*visit, _passed("True")],
            "add_keys_params": [_row(*dq_state), *visit, *_optional(*stores), *_CONSTANTS],
            "add_queries_params": [_row(*dkv_state), *across, *_CONSTANTS],
            "dq_state": ", ".join(dq_state),
            "dkv_state": ", ".join(dkv_state),
            "_add_keys": [_row(*dq_state), *visit, *_optional(*stores)],
            "_add_queries": [_row(*dkv_state), *across],
        }

    # ------------------------------------------------------------ loops

    def loops(self) -> dict[str, Any]:
        """Return the loops of each kernel, and what rows that see nothing add to them."""
        mask, made = self.spec.mask, self.tiles()
        visited = holes.visited(self.spec)
        stops = self.spec.fill.how == "replace"
        fill = Fill() if stops else visited  # a score that was replaced passes nothing back

        def add_keys(masked: bool) -> list[str]:
            return _call(made["dq_state"], "_add_keys", made["_add_keys"], masked)

        def add_queries(masked: bool) -> list[str]:
            return _call(made["dkv_state"], "_add_queries", made["_add_queries"], masked)

        spread, group = self.spread, self.spec.group_size
        ranges = tiles.stretched(mask, visited, self.queries)
        missed = tiles.missed(mask, visited, self.queries)
        seen = [f"((n < {hi}) & (n + BLOCK_N > {lo}))" for lo, hi in (("lo", "hi"), ("lo_1", "hi_1"))]
        seen = seen[: len(tiles.spans(mask, fill))]
        if spread is not None and not stops:
            seen.append(f"({spread['here']})")
        everything = tiles.outer(mask) == (tiles.EVERYTHING,) or not tiles.may_skip(fill)
        return {
            "dq_loops": tiles.loops(mask, fill, add_keys, self.keys),
            "dq_spread": spread is not None and not stops,
            "dq_everything": self._every_key(add_keys(True)),
            "dkdv_bounds": [x for lines, _ in ranges for x in lines],
            "dkdv_runs": [x for _, parts in ranges for p in parts for x in self._run(*p, add_queries(p[2]))],
            "dkdv_spread": spread is not None,
            "by_head": group > 1 and bool(self.of_kind("columns")),
            "dkdv_visit": add_queries(True),
            "missed": f"{missed} & " if missed else "",
            "spread": spread,
            "base2": self.frame["base2"] or self.frame["extreme"],
            "tile": _turn(tiles.grows(mask, self.keys)),
            "keys_tile": _turn(tiles.grows(mask, self.queries)),
            "pair_bounds": []
            if everything
            else [x for lines, _ in tiles.stretched(mask, fill) for x in lines],
            "pair_seen": launches.seen(self.layout, [] if everything else seen or ["False"]),
            **self._refined(),
        }

    def _run(self, begin: str, end: str, masked: bool, body: list[str]) -> list[str]:
        """Return a loop over tiles of queries; where nothing is kept per head, one loop over all heads."""
        group = self.spec.group_size
        if group == 1 or self.of_kind("columns"):
            return tiles.loop(begin, end, body, view=self.queries)
        span = end if begin == "0" else f"{end} - {begin}"
        first = "turn % count * BLOCK_M"
        return [
            f"count = tl.cdiv(tl.maximum({span}, 0), BLOCK_M)",
            f"for turn in range(0, count * {group}):",
            f"    h = kv_head * {group} + turn // count",
            f"    first = {begin} + {first}",
            *(f"    {line}" for line in body),
        ]

    def _refined(self) -> dict[str, Any]:
        """Return how the kernel over rows weighs a row of very low scores again."""
        own = (
            shares.share_holes(self.spec.norm) if isinstance(self.spec.norm, Normalized) else {"settled": ""}
        )
        if not self.refines:
            return {"refine": [], "low": "", "depth": "", **own}
        visited = self.pairs()["visited"]
        visit = _call(visited, "_visit", self.tiles()["visit_here"][:-1], True)
        if isinstance(self.spec.norm, Normalized):
            return {
                "refine": self._every_key([*visit, "l += tl.sum(s, 1)"]),
                "refine_start": [shares.NONE],
                **own,
            }
        body = [
            *visit,
            "new_m = tl.maximum(m, tl.max(s, 1))",
            'base = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen nothing yet',
            "l = l * tl.exp2(m - base) + tl.sum(tl.exp2(s - base[:, None]), 1)",
            "m = new_m",
        ]
        sink = next((x for x in self.inputs if x.role == "sink"), None)
        start = [line for line in self.frame["start"] if not line.startswith("acc")]
        return {
            "refine": self._every_key(body),
            "refine_start": [*([f"{sink.name}_at = {_base(sink)}"] if sink else []), *start],
            "low": number(self.low.refine or 0.0),
            "depth": "-top" if isinstance(self.spec.norm, SignedSoftmax) else "top",
            **own,
        }

    def _every_key(self, body: list[str]) -> list[str]:
        """Return a loop that is seldom run, over all keys."""
        return tiles.loop("0", "sk", body, "tl.range({}, {}, {}, num_stages=1)")

    # ------------------------------------------------------------ kernels and the launcher

    def calls(self) -> dict[str, Any]:
        """Return the parameters and arguments of each kernel."""
        own = ["q", "k", "v", "dout"]
        out = {name: [g.x for g in self.of_kind(name)] for name in ("rows", "columns", "pairs")}
        refined, settled = self.refines, ["dlse"] if self._refined()["settled"] else []
        rows_in = [*(["q", "k", "v"] if refined else []), "dout", "out"]
        seeds = self.frame["seeds"]
        reach, reach_k = ([x.reach.name] if x.reach else [] for x in (self.keys, self.queries))
        dq_out = ["dq", *(f"d_{x.name}" for x in (*out["rows"], *out["pairs"]))]
        dkdv_out = ["dk", "dv", *(f"d_{x.name}" for x in out["columns"])]
        return {
            "rows_call": self._call(
                rows_in,
                ["lse", *settled, *self.stats, *(seeds if refined else [])],
                self.inputs if refined else (),
                "q",
                "heads",
            ),
            "dq_call": self._call(
                own,
                [*reach, *self.stats, *seeds, *dq_out],
                self.pair_inputs,
                "qk" if out["pairs"] else "q",
                "heads",
            ),
            "dkdv_call": self._call(
                own, [*reach_k, *self.stats, *seeds, *dkdv_out], self.pair_inputs, "k", "kv_heads"
            ),
        }

    def _call(self, strided: list[str], plain: list[str], inputs: Any, along: str, *counts: str) -> Call:
        return launches.call(self.layout, strided, plain, inputs, along, *counts)

    def grads(self) -> dict[str, Any]:
        """Return the gradients of captured tensors, and how the launcher collects them."""
        listed = {
            kind: [{"name": g.x.name, "tensor": g.x.tensor, "at": g.at} for g in self.of_kind(kind)]
            for kind in ("rows", "columns", "pairs")
        }
        sink = next((x for x in self.inputs if x.role == "sink"), None)
        sink_at = next((3 + i for i, o in enumerate(self.spec.captured) if sink and o == sink.operand), None)
        needs = {
            "dq": [0, *(g.at for g in self.found if g.kind in ("rows", "pairs"))],
            "dkdv": [1, 2, *(g.at for g in self.of_kind("columns"))],
        }
        return {
            "keys_configs": [(arch, str(x)) for arch, x in choose_keys(self.spec).items()],
            "grads": [{"name": x.name} for x in self.inputs if x.role in _FLOAT_ROLES],
            "row_grads": listed["rows"],
            "column_grads": listed["columns"],
            "pair_stores": listed["pairs"],
            "summed_grads": [self._summed(g) for g in self.of_kind("summed")],
            "sink_at": sink_at,
            "sink_name": sink.name if sink else "",
            "results": [self._result(o.name) for o in self.spec.captured],
            **{f"{name}_wanted": " or ".join(f"needs[{n}]" for n in found) for name, found in needs.items()},
        }

    def _summed(self, g: Grad) -> dict[str, Any]:
        """Return a kernel that sums the gradient of pairs over batch entries, heads or both."""
        here = "".join(a for a in "bh" if a in g.x.axes)
        count, b, h, over = {
            "b": ("heads", "place", "other", "heads"),
            "h": ("batch", "other", "place", "batch entries"),
            "": ("batch * heads", "other // heads", "other % heads", "batch entries and heads"),
        }[here]
        wide = {"b": f"tl.cast({b}, tl.int64)", "h": f"tl.cast({h}, tl.int64)"}
        own = ["q", "k", "v", "dout"]
        return {
            "name": g.x.name,
            "tensor": g.x.tensor,
            "at": g.at,
            "target": g.x.target(),
            "count": count,
            "over": over,
            **wide,
            "places": {"b": " * batch", "h": " * heads", "": ""}[here],
            "call": self._call(
                own,
                [*self.stats, *self.frame["seeds"], f"d_{g.x.name}"],
                self.pair_inputs,
                "qk",
                "batch",
                "heads",
            ),
        }

    def _result(self, operand: str) -> str:
        """Return the gradient of a captured tensor in the launcher, from what kernels leave unsummed."""
        parts = [f"d_{x.name}" for x in self.inputs if x.operand.name == operand and x.role in _FLOAT_ROLES]
        if len(parts) < 2:
            return parts[0] if parts else "None"
        at = 3 + [o.name for o in self.spec.captured].index(operand)
        return f"{' + '.join(parts)} if needs[{at}] else None"


def _call(state: str, function: str, given: list[str], masked: bool) -> list[str]:
    """Return a call of a function over one tile."""
    return [f"{state} = {function}(", *(f"    {line}" for line in [*given, _passed(str(masked))]), ")"]


def _passed(masked: str) -> str:
    return f"MASKED={masked}, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,"


def _turn(grows: bool) -> str:
    """Return which tile a program takes: the longest first."""
    return "tiles - 1 - tl.program_id(0) % tiles" if grows else "tl.program_id(0) % tiles"


def _base(x: Input) -> str:
    """Return the address of an input's first element for a batch entry and a head."""
    return " + ".join([f"{x.name}_ptr", *(f"{a} * {x.name}_{a}" for a in x.axes if a in "bh")])


def _pair_strides(x: Input) -> list[str]:
    return [f"{x.name}_{a}" for a in x.axes if a in "qk"]


def _pair(x: Input) -> dict[str, Any]:
    """Return the loads of an input for the pairs of a tile, whichever way it lies.

    Masked: keys may lie past the end.
    """
    terms = [f"{x.name}_at"]
    for axis, start, step in (("q", "first", "i"), ("k", "n", "j")):
        if axis in x.axes:
            terms += [f"tl.cast({start}, tl.int64) * {x.name}_{axis}", f"{step} * {x.name}_{axis}"]
    rows, cols = ["(qi < sq)"] * ("q" in x.axes), ["(ki < sk)"] * ("k" in x.axes)

    def load(bounds: list[str]) -> str:
        mask = f", mask={' & '.join(bounds)}, other=0" if bounds else ""
        return x.value(f"tl.load({x.name}_tile{mask})")

    return {"name": x.name, "where": " + ".join(terms), "masked": load(rows + cols), "full": load(rows)}
