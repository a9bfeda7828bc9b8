"""Write the Python that FlexAttention compiles for a spec: ``score_mod``, ``mask_mod``, the call around them.

The text is one readable module.  ``modifiers`` takes the captured tensors and returns the two functions:
tensors are bindings of one call, so a new call compiles nothing.  ``attend`` is what ``torch.compile``
gets.  An axis of size 1 is read at 0, so the text depends on which axes of the captured tensors are
broadcast.

Source: Flex Attention (arXiv:2412.05496), section 3: a score edit and a mask as functions of (batch, head,
query, key).
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from attnc.codegen.flex.pointwise import written
from attnc.errors import UnsupportedError
from attnc.formula import fold
from attnc.formula_text import Text
from attnc.ir import AttentionSpec, Bias, Gain, Pointwise, Scale, Softcap, Step
from attnc.masks import And, Band, Dense, Formula, Full, Mask, Not, Or, Padding, Range

Broadcast = tuple[bool, ...]
"""Which axes of a captured tensor have size 1."""
Sink = Literal["key", "lse"]
BLOCK = 128
"""Queries, and keys, per tile of the block lists: what CUDA kernels want."""
CPU_BLOCK = 64
"""The same on CPU: windows take 0.6 to 0.9 times as long as with 128, since less is wasted at their edges."""

HARD_FILL = -1e4
"""Finite fills up to this one hide a key: ``exp`` of it is zero in fp32 for scores less than 9,800 apart."""
_IMPORT = "from torch.nn.attention.flex_attention import {}BlockMask, flex_attention"
_WORDS = (
    "score",
    "b",
    "h",
    "q",
    "k",
    "v",
    "p",
    "keep",
    "out",
    "aux",
    "torch",
    "captured",
    "lengths",
    "blocks",
)
_FUNCTIONS = ("modifiers", "attend", "block_mask", "score_mod", "mask_mod", "flex_attention")
_TAKEN = frozenset((*_WORDS, *_FUNCTIONS, "BlockMask", "AuxRequest"))
"""Names that mean something else in the text."""


def source(
    spec: AttentionSpec, broadcast: Sequence[Broadcast] | None = None, sink: Sink = "key", block: int = BLOCK
) -> str:
    """Return a module: ``modifiers(*captured, lengths)``, ``attend(q, k, v, captured, lengths, blocks)``.

    ``broadcast`` has one tuple per captured tensor (default: from the spec's shapes).  ``lengths`` is an
    int64 tensor ``[2]`` with Sq and Sk in tokens.  ``sink`` says how a sink enters: ``key`` expects a key
    of its own behind the Sk others, with a value of zero (the CPU kernel returns no log-sum-exp); ``lse``
    makes ``attend`` return the log-sum-exp too, for the caller to rescale by.  ``blocks`` are block lists
    for tiles of ``block`` queries and keys.

    Raises:
        UnsupportedError: a step or a predicate that has no text here.
    """
    if broadcast is None:
        broadcast = [tuple(n == 1 for n in o.shape) for o in spec.captured]
    text = _Text(spec, tuple(broadcast))
    own_key = spec.norm.sink is not None and sink == "key"
    wants_lse = spec.norm.sink is not None and sink == "lse"
    lines = [
        f'"""FlexAttention for: {spec}"""',
        "",
        "import torch",
        _IMPORT.format("AuxRequest, " if wants_lse else ""),
        "",
        "",
        *_modifiers_lines(text, own_key),
        "",
        "",
        *_attend_lines(spec, wants_lse, block),
    ]
    return "\n".join(lines) + "\n"


def _modifiers_lines(text: _Text, own_key: bool) -> list[str]:
    parameters = [*(text.name(o.name) for o in text.spec.captured), "lengths"]
    return [
        f"def modifiers({', '.join(parameters)}):",
        *text.about(),
        "",
        "    def score_mod(score, b, h, q, k):",
        *(f"        {line}" for line in _score_lines(text, own_key)),
        "        return score",
        "",
        "    def mask_mod(b, h, q, k):",
        *(f"        {line}" for line in _mask_lines(text, block_mask(text.spec), own_key)),
        "        return keep",
        "",
        "    return score_mod, mask_mod",
    ]


def is_soft(spec: AttentionSpec) -> bool:
    """Say whether hidden keys can keep some weight: a finite fill that a score can come near.

    A bias or an expression may give any value, the lowest of its dtype among them, so a finite fill
    beside one is soft.
    """
    biased = any(isinstance(s, Bias | Pointwise) for s in spec.scores)
    return (
        not isinstance(spec.mask, Full)
        and not math.isinf(spec.fill.value)
        and (biased or spec.fill.value > HARD_FILL)
    )


def block_mask(spec: AttentionSpec) -> Mask:
    """Return what flex may leave out: the mask, or nothing where hidden keys keep some weight."""
    return Full() if is_soft(spec) else spec.mask


def _score_lines(text: _Text, own_key: bool) -> list[str]:
    """Return the lines that edit a score, behind the leading scales, which flex applies itself."""
    spec = text.spec
    at = next((i for i, s in enumerate(spec.scores) if not isinstance(s, Scale)), len(spec.scores))
    lines = [f"score = {text.step(s)}" for s in spec.scores[at:]]
    if is_soft(spec):
        fill = max(spec.fill.value, torch.finfo(torch.float32).min)
        filled = f"score + {fill!r}" if spec.fill.how == "add" else repr(fill)
        lines += [*_mask_lines(text, spec.mask, False), f"score = torch.where(keep, score, {filled})"]
    return [*lines, f"score = torch.where(k == lengths[1], {text.sink()}, score)"] if own_key else lines


def _mask_lines(text: _Text, mask: Mask, own_key: bool) -> list[str]:
    """Return the lines that set ``keep``."""
    parts = mask.parts if isinstance(mask, And) else (mask,)
    lines = ["p = q + lengths[1] - lengths[0]"] if _has_end_band(mask) else []
    lines.append(f"keep = {text.mask(parts[0])}")
    lines += [f"keep = keep & {_bracket(text.mask(p))}" for p in parts[1:]]
    return [*lines, "keep = keep | (k == lengths[1])"] if own_key and not isinstance(mask, Full) else lines


def _has_end_band(mask: Mask) -> bool:
    match mask:
        case And(parts) | Or(parts):
            return any(_has_end_band(p) for p in parts)
        case Not(part):
            return _has_end_band(part)
    return isinstance(mask, Band) and mask.align == "end"


def _attend_lines(spec: AttentionSpec, wants_lse: bool, block: int) -> list[str]:
    aux = ["        return_aux=AuxRequest(lse=True),"] if wants_lse else []
    returns = ["    return out, aux.lse"] if wants_lse else ["    return out"]
    return [
        "def attend(q, k, v, captured, lengths, blocks):",
        '    """Return the output [B, H, Sq, Dv]'
        + (' and the log-sum-exp [B, H, Sq]."""' if wants_lse else '."""'),
        "    score_mod, mask_mod = modifiers(*captured, lengths)",
        "    block_mask = BlockMask.from_kv_blocks(",
        "        *blocks,",
        f"        BLOCK_SIZE={block},",
        "        mask_mod=mask_mod,",
        "        seq_lengths=(q.shape[2], k.shape[2]),",
        "        compute_q_blocks=False,",
        "    )",
        f"    {'out, aux' if wants_lse else 'out'} = flex_attention(",
        "        q,",
        "        k,",
        "        v,",
        "        score_mod=score_mod,",
        "        block_mask=block_mask,",
        f"        scale={spec.scale!r},",
        f"        enable_gqa={spec.group_size > 1},",
        *aux,
        "    )",
        *returns,
    ]


@dataclass(frozen=True)
class _Text:
    """Expressions over ``score, b, h, q, k`` for the steps and predicates of one spec."""

    spec: AttentionSpec
    broadcast: tuple[Broadcast, ...]

    def name(self, operand: str) -> str:
        """Return an identifier for an operand that shadows nothing in the module."""
        others = {o.name for o in self.spec.captured} - {operand}
        name = operand if operand.isidentifier() else f"t_{operand}"
        while name in _TAKEN or name in others or keyword.iskeyword(name):
            name += "_"
        return name

    def ones(self, operand: str) -> Broadcast:
        """Return which axes of the operand have size 1."""
        named = {o.name: ones for o, ones in zip(self.spec.captured, self.broadcast, strict=True)}
        return named[operand]

    def about(self) -> list[str]:
        """Return the lines of a docstring that lists the tensors with their axes."""
        told = []
        for o in self.spec.captured:
            axes = ["1" if one else a for one, a in zip(self.ones(o.name), o.axes, strict=False)]
            told.append(f"    {self.name(o.name)} [{', '.join(axes)}]")
        first = '    """Return the score edit and the mask'
        return [f"{first}, which read:", "", *told, '    """'] if told else [f'{first}."""']

    def read(self, operand: str, axes: str = "bhqk") -> str:
        """Return the element of a tensor at (b, h, q, k); its axes are the last of ``axes``."""
        ones = self.ones(operand)
        if not ones:
            return self.name(operand)
        at = ("0" if one else a for one, a in zip(ones, axes[-len(ones) :], strict=True))
        return f"{self.name(operand)}[{', '.join(at)}]"

    def wide(self, operand: str, axes: str = "bhqk") -> str:
        """Return the element in fp32."""
        dtype = next(o.dtype for o in self.spec.captured if o.name == operand)
        return self.read(operand, axes) + ("" if dtype == torch.float32 else ".to(torch.float32)")

    def value(self, operand: str) -> str:
        """Return the element in fp32, or as it is if it is a condition."""
        dtype = next(o.dtype for o in self.spec.captured if o.name == operand)
        return self.read(operand) if dtype == torch.bool else self.wide(operand)

    def sink(self) -> str:
        """Return the sink of head ``h``."""
        sink = self.spec.norm.sink
        return self.wide(sink, "h") if isinstance(sink, str) else repr(float(sink or 0.0))

    def step(self, step: Step) -> str:
        """Return the edited score."""
        match step:
            case Scale(factor):
                return f"score * {factor!r}"
            case Softcap(cap):
                return f"{cap!r} * torch.tanh(score / {cap!r})"
            case Bias(operand, sign):
                return f"score {'+' if sign > 0 else '-'} {self.wide(operand)}"
            case Gain(operand):
                return f"score * {self.wide(operand)}"
            case Pointwise():
                return written(step.term, self.value)
        raise UnsupportedError(f"flex: expected scale, softcap, bias, gain or pointwise, found {step}")

    def mask(self, mask: Mask) -> str:
        """Return whether the pair is visible."""
        match mask:
            case Full():
                return "k >= 0"
            case Band(left, right, align):
                return _band(left, right, "p" if align == "end" else "q")
            case Range(axis, lo, hi):
                return f"({axis} >= {lo}) & ({axis} < {hi})"
            case Padding(operand, axis):
                return self.read(operand, f"b{axis}")
            case Dense(operand):
                return self.read(operand)
            case Formula(value):
                return fold(value, _FormulaText(self))
            case And(parts) | Or(parts):
                sign = " & " if isinstance(mask, And) else " | "
                return sign.join(_bracket(self.mask(p)) for p in parts)
            case Not(part):
                return f"~{_bracket(self.mask(part))}"
        raise UnsupportedError(f"flex: expected a mask of known kind, found {mask}")


class _FormulaText(Text):
    """Formulas as torch expressions over ``b, h, q, k`` and ``lengths``."""

    def __init__(self, text: _Text) -> None:
        self.text = text

    def symbol(self, name: str) -> str:
        """Return a position, or an element of ``lengths``."""
        return {"Sq": "lengths[0]", "Sk": "lengths[1]"}.get(name, name)

    def read(self, operand: str, axes: str) -> str:
        """Return the element; an axis of size 1 is read at 0."""
        return self.text.read(operand, axes)

    def where(self, c: str, a: str, b: str) -> str:
        """Return the choice."""
        return f"torch.where({c}, {a}, {b})"


def _band(left: int | None, right: int | None, p: str) -> str:
    """Return ``-right <= p - k <= left``; ``p`` is the query's position on the key axis."""
    if left is None and right is None:
        return "k >= 0"
    sides = [f"{p} - k <= {left}"] if left is not None else []
    sides += [f"k <= {p}" if right == 0 else f"k - {p} <= {right}"] if right is not None else []
    return sides[0] if len(sides) == 1 else f"({sides[0]}) & ({sides[1]})"


def _bracket(text: str) -> str:
    """Put parentheses around anything but a name or an element of a tensor."""
    return text if re.fullmatch(r"\w+(\[[\w, ]*\])?", text) else f"({text})"
