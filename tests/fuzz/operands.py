"""The text that brings q, k and v from the tensors a program takes to [B, H, L, D], and edits them there."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from tests.fuzz.axes import Spelling
from tests.fuzz.text import Writer


@dataclass(frozen=True)
class Operand:
    """Name of the tensor, and its sizes as text: heads, length, features."""

    name: str
    heads: str
    length: str
    features: str


@dataclass(frozen=True)
class Layout:
    """How a tensor is stored and viewed. ``batch`` and ``length`` read its sizes off its shape."""

    shape: tuple[str, ...]
    view: str
    batch: str
    length: str


def layouts(o: Operand) -> dict[str, Layout]:
    """Return the layouts of an operand by name."""
    x, hh, n, f = o.name, o.heads, o.length, o.features
    size = f"{x}.shape[{{}}]".format
    return {
        "bhld": Layout(("b", hh, n, f), x, size(0), size(2)),
        "blhd": Layout(("b", n, hh, f), f"{x}.transpose(1, 2)", size(0), size(1)),
        "merged": Layout(
            ("b", n, f"{hh} * {f}"), f"{x}.view(b, {n}, {hh}, {f}).transpose(1, 2)", size(0), size(1)
        ),
        "lbhd": Layout((n, "b", hh, f), f"{x}.permute(1, 2, 0, 3)", size(1), size(0)),
        "flat": Layout((f"b * {hh}", n, f), f"{x}.view(b, {hh}, {n}, {f})", f"{size(0)} // ({hh})", size(1)),
        "fairseq": Layout(
            (n, "b", f"{hh} * {f}"),
            f"{x}.reshape({n}, b * {hh}, {f}).transpose(0, 1).view(b, {hh}, {n}, {f})",
            size(1),
            size(0),
        ),
        "transposed": Layout(("b", hh, f, n), f"{x}.mT", size(0), size(3)),
        "channels": Layout(
            ("b", f"{hh} * {f}", n), f"{x}.view(b, {hh}, {f}, {n}).transpose(2, 3)", size(0), size(2)
        ),
        "features_first": Layout(
            ("b", n, f"{f} * {hh}"), f"{x}.view(b, {n}, {f}, {hh}).permute(0, 3, 1, 2)", size(0), size(1)
        ),
        "padded": Layout(("b", hh, f"{n} + 3", f), f"{x}[:, :, 1:-2]", size(0), f"{size(2)} - 3"),
        "strided": Layout(("b", hh, f"2 * {n}", f), f"{x}[:, :, ::2]", size(0), f"{size(2)} // 2"),
        "one_of_three": Layout(("b", n, hh, "3", f), f"{x}[:, :, :, 1].transpose(1, 2)", size(0), size(1)),
        "interleaved": Layout(
            ("b", n, hh, f"2 * {f}"), f"{x}.chunk(2, -1)[1].permute(0, 2, 1, 3)", size(0), size(1)
        ),
        "projected": Layout(
            ("b", n, "3"),
            f"F.linear({x}, w{x}).unflatten(-1, ({hh}, {f})).movedim(-2, 1)",
            size(0),
            size(1),
        ),
        "indexed": Layout(("b", hh, n, f), f"{x}[:, :, torch.arange({n})]", size(0), size(2)),
        "copied": Layout(("b", n, hh, f), f"{x}.permute(0, 2, 1, 3).contiguous().clone()", size(0), size(1)),
    }


def scrambled(o: Operand, w: Writer, r: random.Random, cut_all: bool) -> Layout:
    """Return a layout at random: axes cut in two, permuted, merged, padded, beside others, and read back.

    ``cut_all`` lets lengths be cut as well, which takes numbers for sizes.
    """
    names = ("b", o.heads, o.length, o.features)
    atoms: list[tuple[int, str, int]] = []  # axis, size as text, size
    for axis, name in enumerate(names):
        n = int(eval(name, {}, dict(w.z)))
        if n % 2 == 0 and n > 2 and (cut_all or axis in (1, 3)) and r.random() < 0.4:
            atoms += [(axis, "2", 2), (axis, f"({name}) // 2", n // 2)]
        else:
            atoms.append((axis, name, n))
    beside = (4, "3", 3)
    places = {a: i for i, a in enumerate(atoms)}
    order = list(range(len(atoms))) + ([len(atoms)] if r.random() < 0.4 else [])
    assert len(places) <= len(atoms)
    r.shuffle(order)
    atoms.append(beside)
    groups: list[list[int]] = []
    for i in order:
        if groups and r.random() < 0.4:
            groups[-1].append(i)
        else:
            groups.append([i])
    texts = [" * ".join(f"({atoms[i][1]})" for i in g) for g in groups]
    cut, start, end = r.randrange(len(groups)), r.randint(0, 2), r.randint(0, 2)
    shape = tuple(f"{t} + {start + end}" if i == cut else t for i, t in enumerate(texts))
    view = f"{o.name}.narrow({cut}, {start}, {texts[cut]}).reshape({', '.join(atoms[i][1] for i in order)})"
    left = [i for i in order if i != len(atoms) - 1]
    if len(left) < len(order):
        view += f".select({order.index(len(atoms) - 1)}, {r.randrange(3)})"
    back = ", ".join(str(left.index(i)) for i in sorted(left))
    view += f".permute({back}).reshape({', '.join(names)})"
    return Layout(shape, view, "", "")


def write_operands(w: Writer, x: Spelling) -> None:
    """Write inputs, sizes and views, down to q, k and v in canonical layout, keys not yet copied."""
    q, k, v = (
        Operand("q", "h * n", "s", "d"),
        Operand("k", "h", "t", "d"),
        Operand("v", "h", "t", "e"),
    )
    if x.packed != "none":
        _write_packed(w, x, q)
        return
    r = random.Random(x.seed)
    chosen = {}
    for o, kind in ((q, x.q_layout), (k, x.k_layout), (v, x.v_layout)):
        if kind == "cached":
            rest = f"{o.length} - 2"
            chosen[o] = Layout(
                ("b", o.heads, rest, o.features),
                f"torch.cat([past_{o.name}, {o.name}], 2)",
                f"{o.name}.shape[0]",
                f"{o.name}.shape[2] + 2",
            )
        elif kind == "scrambled":
            chosen[o] = scrambled(o, w, r, x.trace == "static" and x.reads == "numbers")
        else:
            chosen[o] = layouts(o)[kind]
    for o, layout in chosen.items():
        w.take(o.name, *layout.shape)
        if layout.view.startswith("torch.cat"):
            w.take(f"past_{o.name}", "b", o.heads, "2", o.features)
        if "F.linear" in layout.view:
            w.take(f"w{o.name}", f"{o.heads} * {o.features}", "3")
    lengths = {o.name: layout.length for o, layout in chosen.items()}
    batch = next((c.batch for c in chosen.values() if c.batch), "")
    _write_sizes(w, x, batch, lengths["q"], lengths["k"] or lengths["v"])
    for o, layout in chosen.items():
        if layout.view != o.name:
            w(f"{o.name} = {layout.view}")


def _write_sizes(w: Writer, x: Spelling, b: str, s: str, t: str) -> None:
    z = w.z
    w(f"h, n, d, e = {z['h']}, {z['n']}, {z['d']}, {z['e']}")
    if x.reads == "numbers":
        w(f"b, s, t = {z['b']}, {z['s']}, {z['t']}")
        return
    for name, text in zip("bst", (b, s, t), strict=True):
        if text:
            w(f"{name} = {text}")
        else:  # no operand says it plainly
            size = w.take(f"like_{name}", name)
            w(f"{name} = {size}.shape[0]")


def _write_packed(w: Writer, x: Spelling, q: Operand) -> None:
    if x.packed == "keys_values":
        layout = layouts(q)[x.q_layout if x.q_layout not in ("scrambled", "projected") else "merged"]
        w.take("q", *layout.shape)
        w.take("kv", "b", "t", "2", "h", "d")
        _write_sizes(w, x, layout.batch, layout.length, "kv.shape[1]")
        if layout.view != "q":
            w(f"q = {layout.view}")
        w("k, v = kv.permute(2, 0, 3, 1, 4)")
        return
    shape = (
        ("b", "s", "(h * n + h) * d + h * e") if x.packed in ("split", "narrow") else ("b", "s", "3 * h * d")
    )
    w.take("qkv", *shape)
    _write_sizes(w, x, "qkv.shape[0]", "qkv.shape[1]", "qkv.shape[1]")
    apart = (
        "q = q.reshape(b, s, h * n, d).transpose(1, 2)",
        "k = k.reshape(b, t, h, d).transpose(1, 2)",
        "v = v.reshape(b, t, h, e).transpose(1, 2)",
    )
    if x.packed == "chunk":
        w("q, k, v = qkv.chunk(3, dim=-1)", *apart)
    elif x.packed == "split":
        w(
            "q, k, v = qkv.split([h * n * d, h * d, h * e], dim=-1)",
            *apart,
        )
    elif x.packed == "narrow":
        w("q, k, v = qkv[..., :h * n * d], qkv.narrow(-1, h * n * d, h * d), qkv[..., (h * n + h) * d:]")
        w(*apart)
    elif x.packed == "unbind":
        w("q, k, v = qkv.view(b, s, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)")
    elif x.packed == "select":
        w(
            "qkv = qkv.view(b, s, 3, h, d).transpose(1, 3)",
            "q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]",
        )
    else:
        w("q, k, v = qkv.view(b, s, h, 3 * d).transpose(1, 2).split(d, dim=-1)")


NORMED = {
    "rms": "{x} = {x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-6)",
    "unit": "{x} = F.normalize({x}, dim=-1)",
    "layer": "{x} = F.layer_norm({x}, ({x}.shape[-1],))",
}
ROTATED = {
    "halves": "{x} = {x} * {c} + torch.cat([-{x}[..., d // 2:], {x}[..., :d // 2]], -1) * {s}",
    "interleaved": "{x} = {x} * {c} + torch.stack([-{x}[..., 1::2], {x}[..., ::2]], -1).flatten(-2) * {s}",
    "complex": "{x} = torch.view_as_real("
    "torch.view_as_complex({x}.reshape(*{x}.shape[:-1], d // 2, 2).contiguous())"
    " * torch.polar(torch.ones_like({a}), {a})).flatten(-2)",
    "partial": "{x} = torch.cat([{x}[..., :1] * {c}[..., :1], {x}[..., 1:]], -1)",
}


def write_edits(w: Writer, x: Spelling) -> None:
    """Write what norms and rotates q and k."""
    if x.normed != "none":
        w(*(NORMED[x.normed].format(x=o) for o in "qk"))
    if x.rotary == "none":
        return
    if x.rotary == "tables":
        for o, n in (("q", "s"), ("k", "t")):
            c, s = w.take(f"cos_{o}", n, "d"), w.take(f"sin_{o}", n, "d")
            w(ROTATED["halves"].format(x=o, c=c, s=s))
        return
    w("rates = 0.5 ** torch.arange(d // 2, dtype=torch.float64)")
    for o, n in (("q", "s"), ("k", "t")):
        w(f"angle = torch.arange({n}, dtype=torch.float64)[:, None] * rates")
        if x.rotary == "complex":
            w(ROTATED["complex"].format(x=o, a="angle"))
            continue
        twice = (
            "angle.repeat_interleave(2, -1)" if x.rotary == "interleaved" else "torch.cat([angle] * 2, -1)"
        )
        w(f"angle = {twice}")
        w(ROTATED[x.rotary].format(x=o, c="angle.cos()", s="angle.sin()"))


COPIES = {
    "repeat_interleave": "{x}.repeat_interleave(n, 1)",
    "expand": "{x}[:, :, None].expand(b, h, n, t, {f}).reshape(b, h * n, t, {f})",
    "repeat": "{x}.repeat(1, n, 1, 1)",
    "tile": "{x}.tile((1, n, 1, 1))",
    "stack": "torch.stack([{x}] * n, 2).flatten(1, 2)",
    "indexed": "{x}[:, torch.arange(h * n) // n]",
    "concatenated": "torch.cat([{x}] * n, 1)",
}


def write_copies(w: Writer, x: Spelling) -> None:
    """Write how keys and values are given to the query heads of their group."""
    if w.z["n"] > 1 and x.heads != "grouped":
        w(*(f"{o} = {COPIES[x.copies].format(x=o, f=f)}" for o, f in (("k", "d"), ("v", "e"))))


def scaling(x: Spelling, d: int) -> float:
    """Return the factor of the scores."""
    return {0: 0.5, 1: 1 / math.sqrt(d), 2: 0.125}[x.seed % 3]
