"""Give equal computations one text: rename what a spec reads, and drop the sizes that no kernel depends on.

Two sites whose specs differ in the names of their tensors, in lengths or in head counts share a kernel.
Kept are the head sizes, the dtypes, the group size, every step, and which axes of a captured tensor
broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attnc.codegen.triton.inputs import Input, name_inputs
from attnc.ir import AttentionSpec, Bias, Gain, Operand, Pointwise, Softmax, Step
from attnc.masks import rename
from attnc.pointwise import rename as renamed
from attnc.pointwise import text

_SIZES = {"b": "b", "h": "h", "q": "sq", "k": "sk"}


def canonical(spec: AttentionSpec) -> AttentionSpec:
    """Return the spec of the same computation with our names and sizes; it is its own canonical form."""
    inputs = name_inputs(spec)
    names = {o.name: _name(at, o, inputs) for at, o in enumerate(spec.captured)}
    norm = spec.norm
    if isinstance(norm, Softmax) and isinstance(norm.sink, str):
        norm = replace(norm, sink=names[norm.sink])
    q = replace(spec.q, name="q", shape=("b", "h", "sq", spec.q.shape[3]))
    k = replace(spec.k, name="k", shape=("b", "hkv", "sk", spec.k.shape[3]))
    v = replace(spec.v, name="v", shape=("b", "hkv", "sk", spec.v.shape[3]))
    return replace(
        spec,
        q=q,
        k=k,
        v=v,
        scores=tuple(_step(s, names) for s in spec.scores),
        mask=rename(spec.mask, names),
        norm=norm,
        captured=tuple(_operand(o, names[o.name], inputs) for o in spec.captured),
    )


def _name(at: int, operand: Operand, inputs: tuple[Input, ...]) -> str:
    return next((x.tensor for x in inputs if x.operand == operand), f"unused{at}")


def _operand(operand: Operand, name: str, inputs: tuple[Input, ...]) -> Operand:
    """Return the operand with one named size per axis along which it varies, and 1 elsewhere."""
    use = next((x for x in inputs if x.operand == operand), None)
    if use is None:
        return replace(operand, name=name)
    shape = tuple(_SIZES[a] if a in use.axes else 1 for a in use.layout)
    return Operand(name, use.layout, shape, operand.dtype)


def _step(step: Step, names: Mapping[str, str]) -> Step:
    if isinstance(step, Pointwise):
        return Pointwise(text(renamed(step.term, names)))
    return replace(step, operand=names[step.operand]) if isinstance(step, Bias | Gain) else step
