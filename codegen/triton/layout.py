"""How the arguments of a kernel are laid out: which axes have strides, and what else it is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Layout:
    """The arguments of a kernel beside captured tensors.

    ``axes`` names, for each of q, k and v and what else has strides, the axes that have them, in order: b, h,
    m (queries), n (keys), d or e.  Without b, the sequences of a batch follow each other along the tokens.
    ``lists`` are further tensors, int32, by name, with their first axes, as far as strides are passed.
    ``sizes`` are integers.
    """

    axes: Mapping[str, str]
    lists: Mapping[str, str] = field(default_factory=dict)
    sizes: tuple[str, ...] = ("heads", "sq", "sk")

    @property
    def is_packed(self) -> bool:
        """Say whether the sequences of a batch follow each other along the tokens."""
        return "b" not in self.axes["q"]

    def strides(self) -> Iterator[tuple[str, ...]]:
        """Yield the names of the strides of each tensor of ``axes``, in elements."""
        for name, axes in self.axes.items():
            yield tuple(f"{name}_{a}" for a in axes)

    def list_strides(self) -> tuple[str, ...]:
        """Return the names of the strides of the lists, in elements."""
        return tuple(f"{name}_{a}" for name, axes in self.lists.items() for a in axes)

    def list_stride_values(self) -> tuple[str, ...]:
        """Return the launcher's arguments for ``list_strides()``."""
        return tuple(f"{name}.stride({i})" for name, axes in self.lists.items() for i in range(len(axes)))

    def base(self, name: str, head: str) -> str:
        """Return the address where one head of a tensor of ``axes`` begins, as kernel text."""
        axes = self.axes[name]
        if "b" in axes:
            return f"{name}_ptr + b * {name}_b + {head} * {name}_h"
        tokens, start = ("m", "q_start") if "m" in axes else ("n", "k_start")
        return f"{name}_ptr + {start} * {name}_{tokens} + {head} * {name}_h"


DENSE = Layout({"q": "bhmd", "k": "bhnd", "v": "bhnd"})
"""q ``[B, H, Sq, Dqk]``, k ``[B, Hkv, Sk, Dqk]``, v ``[B, Hkv, Sk, Dv]``, any strides."""

PACKED = Layout(
    {"q": "mhd", "k": "nhd", "v": "nhd"}, lists={"cu_q": "", "cu_k": ""}, sizes=("heads", "tokens", "longest")
)
"""q ``[Tq, H, Dqk]``, k ``[Tk, Hkv, Dqk]``, v ``[Tk, Hkv, Dv]``, any strides.

``cu_q`` and ``cu_k``, int32 ``[B + 1]``, say where sequences begin; ``sequence.py.j2`` looks one up there.
``tokens`` is Tq, ``longest`` the most queries of a sequence.
"""

BACKWARD = Layout(
    {**DENSE.axes, "out": "bhme", "dout": "bhme"}, sizes=("heads", "sq", "sk", "batch", "kv_heads")
)
"""As ``DENSE``, with the output and its gradient ``[B, H, Sq, Dv]``, any strides."""

PACKED_BACKWARD = Layout(
    {**PACKED.axes, "out": "mhe", "dout": "mhe"},
    lists=PACKED.lists,
    sizes=(*PACKED.sizes, "wide", "batch", "kv_heads"),
)
"""As ``PACKED``, with the output and its gradient ``[Tq, H, Dv]``, any strides; ``wide`` is the most keys."""
