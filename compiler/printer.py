"""Read the text of a spec or of a mask back: ``parse(str(spec)) == spec``.

The grammar is the one that ``str`` writes (see ``attnc.ir`` and ``attnc.masks``)::

spec = "attn" operand operand operand "group=" INT step* "mask=" mask [fill] norm [dropout] ("with" operand)*
operand= NAME "=" AXES "[" DIM ("," DIM)* "]:" DTYPE mask = "none" | atom | "~" mask | "(" mask (("&" | "|")
mask)* ")"; an atom in braces is a formula over positions (see ``attnc.formula_text``)
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import torch

from attnc.formula_text import named
from attnc.formula_text import parse as parse_formula
from attnc.ir import (
    AttentionSpec,
    Bias,
    Elementwise,
    Fill,
    Gain,
    Normalized,
    Normalizer,
    Operand,
    Pointwise,
    RoundedSoftmax,
    Scale,
    SignedSoftmax,
    Softcap,
    Softmax,
    Step,
)
from attnc.masks import And, Band, Dense, Formula, Full, Mask, Not, Or, Padding, Range
from attnc.pointwise import parse_term

_OPERAND = re.compile(r"(\w+)=(\w+)\[([^\]]*)\]:(\w+)")
_TOKEN = re.compile(r"\s*([()&|~]|\{[^{}]*\}|[a-z]+(?:\([^()]*\))?)")


@lru_cache(maxsize=1024)
def parse(text: str) -> AttentionSpec:
    """Return the spec that printed ``text``.

    Raises:
        ValueError: the text is not a spec; the message names the part that was expected and what was found.
    """
    head, *captured = text.split(" with ")
    start, found, rest = head.partition(" mask=")
    words = start.split()
    if not found or len(words) < 5 or words[0] != "attn" or not words[4].startswith("group="):
        raise ValueError(f"expected 'attn q=.. k=.. v=.. group=.. mask=..', found {text[:80]!r}")
    mask, rest = _mask_and_rest(rest)
    tail = rest.split()
    fill = _fill(tail.pop(0)) if tail and tail[0].startswith("fill(") else Fill()
    if not tail:
        raise ValueError(f"expected a normalizer after the mask, found nothing in {text[:80]!r}")
    norm = _norm(tail.pop(0))
    dropout = float(_args(tail.pop(0), "dropout")[0]) if tail else 0.0
    q, k, v = (_operand(w) for w in words[1:4])
    steps = tuple(_step(w) for w in words[5:])
    group = int(words[4].removeprefix("group="))
    return AttentionSpec(q, k, v, group, steps, mask, fill, norm, tuple(map(_operand, captured)), dropout)


def parse_mask(text: str) -> Mask:
    """Return the mask that printed ``text``.

    Raises:
        ValueError: the text is not a mask, or goes on after one.
    """
    mask, rest = _mask_and_rest(text)
    if rest.strip():
        raise ValueError(f"expected the end of the mask, found {rest!r}")
    return mask


def _args(word: str, name: str) -> list[str]:
    if not (word.startswith(f"{name}(") and word.endswith(")")):
        raise ValueError(f"expected {name}(..), found {word!r}")
    return word[len(name) + 1 : -1].split(",")


def _operand(word: str) -> Operand:
    m = _OPERAND.fullmatch(word)
    dtype = getattr(torch, m[4], None) if m else None
    if m is None or not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected an operand such as q=bhqd[2,8,s77,64]:float32, found {word!r}")
    dims = tuple(int(d) if d.isdigit() else d for d in _sizes(m[3]))
    return Operand(m[1], m[2], dims, dtype)


def _sizes(text: str) -> list[str]:
    """Split at the commas outside brackets: a size is a number, a name, or text such as Mod(s77,8)."""
    out, depth = [""], 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            out.append("")
        else:
            out[-1] += c
    return [size for size in out if size]


def _step(word: str) -> Step:
    kind = word.partition("(")[0]
    if kind not in ("scale", "softcap", "bias", "gain", "pointwise"):
        raise ValueError(f"expected scale, softcap, bias, gain or pointwise, found {word!r}")
    args = _args(word, kind)
    if kind == "pointwise":
        parse_term(",".join(args))
        return Pointwise(",".join(args))
    arg = args[0]
    if kind == "scale":
        return Scale(float(arg))
    if kind == "softcap":
        return Softcap(float(arg))
    name, _, form = arg.lstrip("-").partition(":")
    return Gain(arg) if kind == "gain" else Bias(name, -1 if arg.startswith("-") else 1, form)


def _fill(word: str) -> Fill:
    how, value = _args(word, "fill")
    if how not in ("add", "replace"):
        raise ValueError(f"expected fill(add,..) or fill(replace,..), found {word!r}")
    return Fill(float(value), "add" if how == "add" else "replace")


def _norm(word: str) -> Normalizer:
    if word == "softmax":
        return Softmax()
    if word == "signed-softmax":
        return SignedSoftmax()
    if word == "rounded-softmax":
        return RoundedSoftmax()
    if word.startswith("elementwise("):
        expr = ",".join(_args(word, "elementwise"))
        parse_term(expr)
        return Elementwise(expr)
    if word.startswith("normalized("):
        return _normalized(_args(word, "normalized"))
    sink: str | float | None = None
    words = _args(word, "softmax")
    for w in words:
        if w.startswith("sink="):
            text = w.removeprefix("sink=")
            sink = text if text.isidentifier() and text not in ("inf", "nan") else float(text)
        elif w not in ("upcast", "safe"):
            raise ValueError(f"expected sink=, upcast or safe, found {w!r}")
    return Softmax(sink, "upcast" in words, "safe" in words)


def _normalized(args: list[str]) -> Normalized:
    """Read the expression, whose own commas come first, and what is done to the row's sum."""
    given: dict[str, float] = {}
    while "=" in args[-1] and args[-1].partition("=")[0] in ("added", "least"):
        name, _, value = args.pop().partition("=")
        given[name] = float(value)
    expr = ",".join(args)
    parse_term(expr)
    return Normalized(expr, given.get("added", 0.0), given.get("least", -math.inf))


def _mask_and_rest(text: str) -> tuple[Mask, str]:
    m = _TOKEN.match(text)
    if not m:
        raise ValueError(f"expected a mask, found {text[:40]!r}")
    token, rest = m[1], text[m.end() :]
    if token == "~":
        part, rest = _mask_and_rest(rest)
        return Not(part), rest
    if token != "(":
        return _atom(token), rest
    part, rest = _mask_and_rest(rest)
    parts, signs = [part], set()
    while (m := _TOKEN.match(rest)) and m[1] in "&|":
        signs.add(m[1])
        part, rest = _mask_and_rest(rest[m.end() :])
        parts.append(part)
    if not m or m[1] != ")" or len(signs) != 1:
        raise ValueError(f"expected one kind of operator and ')', found {rest[:40]!r}")
    return (And if signs == {"&"} else Or)(tuple(parts)), rest[m.end() :]


def _atom(token: str) -> Mask:
    if token.startswith("{"):
        return Formula(parse_formula(token))
    kind, _, inside = token.partition("(")
    args = inside.rstrip(")").split(",") if inside else []
    keys = dict(a.split("=", 1) for a in args if "=" in a)
    if kind == "none":
        return Full()
    if kind == "causal":
        return Band(None, 0, "end" if args == ["end"] else "start")
    if kind == "window":
        left, right = (int(keys[n]) if n in keys else None for n in ("left", "right"))
        return Band(left, right, "end" if keys.get("align") == "end" else "start")
    if kind == "range" and len(args) == 3 and args[0] in ("q", "k"):
        return Range("k" if args[0] == "k" else "q", int(args[1]), int(args[2]))
    if kind == "padding" and len(args) == 2:
        return Padding(args[1], "k" if args[0] == "key" else "q")
    if kind == "dense" and len(args) == 1:
        return Dense(args[0])
    short = named(kind, args)
    if short is not None:
        return Formula(short)
    raise ValueError(f"expected none, causal, window, range, padding, dense or a formula, found {token!r}")
