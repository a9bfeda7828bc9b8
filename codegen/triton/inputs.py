"""Name the captured tensors of a spec as the emitted kernel sees them: pointer, strides that matter, loads.

A captured tensor is read along those of its axes ``b h q k`` along which it can vary.  An axis of literal
size 1 where the scores are longer broadcasts: it needs no stride and makes the load smaller, so a bias
``[B, 1, 1, Sk]`` is one row per tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attnc import expr as E
from attnc.formula import reading
from attnc.ir import AttentionSpec, Bias, Gain, Operand, Step
from attnc.masks import And, Dense, Formula, Mask, Not, Or, Padding

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.int64, torch.int32)
_SIZE = {"b": "batch", "h": "heads", "q": "sq", "k": "sk"}


@dataclass(frozen=True, slots=True)
class Input:
    """One use of a captured tensor.

    ``tensor`` is the launcher's name for it and ``name`` the kernel's; they differ where one tensor is used
    in two ways.  ``layout`` names all its axes, ``axes`` those along which it varies.
    """

    operand: Operand
    tensor: str
    name: str
    role: str
    layout: str
    axes: str

    @property
    def is_bool(self) -> bool:
        """Say whether it holds bools, which the kernel reads as bytes: a mask, or a flag of an expression."""
        return self.role in ("valid", "seen", "flag")

    @property
    def is_integer(self) -> bool:
        """Say whether it holds ids or lengths, which a formula of the mask reads."""
        return self.role == "ids"

    @property
    def per_tile(self) -> bool:
        """Say whether it is loaded for each tile of keys; if not, once for the queries."""
        return "k" in self.axes

    def strides(self) -> tuple[str, ...]:
        """Return the names of the stride parameters, in elements."""
        return tuple(f"{self.name}_{a}" for a in self.axes)

    def stride_values(self) -> tuple[str, ...]:
        """Return the launcher's arguments for ``strides()``."""
        return tuple(f"{self.name}.stride({self.layout.index(a)})" for a in self.axes)

    def target(self) -> str:
        """Return the shape to which the launcher broadcasts it."""
        sizes = [_SIZE[a] if a in self.axes else "1" for a in self.layout]
        return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"

    def base(self) -> str:
        """Return the address of this program's first element: its batch entry, head and first query."""
        at = {"b": "b", "h": "h", "q": "tl.cast(first, tl.int64)"}
        return " + ".join(
            [f"{self.name}_ptr", *(f"{at[a]} * {self.name}_{a}" for a in self.axes if a != "k")]
        )

    def where(self) -> str:
        """Return the addresses of a tile: ``[M, N]``, ``[1, N]``, ``[M, 1]`` or one."""
        terms = [f"{self.name}_at"]
        if self.per_tile:
            terms.append(f"tl.cast(n, tl.int64) * {self.name}_k")
        if "q" in self.axes:
            terms.append(f"i[:, None] * {self.name}_q")
        if self.per_tile:
            terms.append(f"j[None, :] * {self.name}_k")
        return " + ".join(terms)

    def load(self, *, masked: bool) -> str:
        """Return the load from ``where()``, called ``.._tile``; masked: keys may lie past the end."""
        inside = ["(rows < sq)[:, None]"] * ("q" in self.axes) + ["inside[None, :]"] * (
            self.per_tile and masked
        )
        bounds = f", mask={' & '.join(inside)}, other=0" if inside else ""
        return self.value(f"tl.load({f'{self.name}_tile' if self.per_tile else self.where()}{bounds})")

    def value(self, load: str) -> str:
        """Return what is loaded as the kernel computes with it: a bool, an integer or fp32."""
        if self.is_integer:
            return load
        return f"{load} != 0" if self.is_bool else f"{load}.to(tl.float32)"


def name_inputs(spec: AttentionSpec) -> tuple[Input, ...]:
    """Return the uses of captured tensors, in the order of the call; a tensor that nothing reads has none."""
    uses = [(o, role, layout) for o in spec.captured for role, layout in _uses(spec, o)]
    roles = [role for _, role, _ in uses]
    out: list[Input] = []
    for at, (operand, role, layout) in enumerate(uses):
        name = role if roles.count(role) == 1 else f"{role}{roles[:at].count(role)}"
        shared = sum(o == operand for o, _, _ in uses) > 1
        tensor = f"tensor{spec.captured.index(operand)}" if shared else name
        out.append(Input(operand, tensor, name, role, layout, _varying(spec, operand, layout)))
    return tuple(out)


def atoms(mask: Mask) -> Iterator[Mask]:
    """Yield the leaves of a mask, in order."""
    if isinstance(mask, And | Or):
        for part in mask.parts:
            yield from atoms(part)
    elif isinstance(mask, Not):
        yield from atoms(mask.part)
    else:
        yield mask


def find(inputs: tuple[Input, ...], operand: str, layout: str) -> Input:
    """Return the use of ``operand`` with this layout."""
    return next(x for x in inputs if x.operand.name == operand and x.layout == layout)


def problem(spec: AttentionSpec) -> str | None:
    """Return why the captured tensors cannot be passed to a kernel, or None."""
    for x in name_inputs(spec):
        o = x.operand
        if len(o.shape) > len(x.layout) or (x.layout != "bhqk" and len(o.shape) != len(x.layout)):
            return f"{o.name} has shape {list(o.shape)}, expected the axes {x.layout}"
        if x.is_bool and o.dtype != torch.bool:
            return f"the mask {o.name} is {o.dtype}, expected torch.bool"
        if x.is_integer and o.dtype not in INTEGERS:
            return f"the ids {o.name} are {o.dtype}, expected int64 or int32"
        if not x.is_bool and not x.is_integer and o.dtype not in (*FLOATS, torch.float64):
            return f"{o.name} is {o.dtype}, expected float16, bfloat16, float32 or float64"
    return None


def _uses(spec: AttentionSpec, operand: Operand) -> dict[tuple[str, str], None]:
    """Return the distinct (role, layout) in which the spec reads ``operand``, in order."""
    found: dict[tuple[str, str], None] = {}
    for step in spec.scores:
        if operand.name in step.operands and not found:
            found[_role(step, operand), "bhqk"] = None
    for atom in atoms(spec.mask):
        if isinstance(atom, Padding) and atom.operand == operand.name:
            found["valid", "b" + atom.axis] = None
        if isinstance(atom, Formula):
            reads = [x for x in E.walk(atom.value) if x.op == "load" and x.args[0] == operand.name]
            found |= {("ids", reading(x) or ""): None for x in reads}
        if isinstance(atom, Dense) and atom.operand == operand.name:
            found["seen", "bhqk"] = None
    if spec.norm.sink == operand.name:
        found["sink", "h"] = None
    return found


def _role(step: Step, operand: Operand) -> str:
    """Return what a step makes of a captured tensor."""
    if isinstance(step, Bias | Gain):
        return "bias" if isinstance(step, Bias) else "gain"
    return "flag" if operand.dtype == torch.bool else "side"


def _varying(spec: AttentionSpec, operand: Operand, layout: str) -> str:
    """Return the axes of ``layout`` along which the operand may vary at run time."""
    size = dict(zip("bhqk", (*spec.q.shape[:3], spec.k.shape[2]), strict=True))
    shape = (1,) * (len(layout) - len(operand.shape)) + operand.shape
    return "".join(a for a, n in zip(layout, shape, strict=False) if n != 1 or size[a] == 1)
