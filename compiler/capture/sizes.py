"""Choose which sizes of the example inputs vary in a captured program.

Every size above 1 does, and torch.export fixes those that the model needs fixed.  Height and width of images
are fixed beforehand: each convolution or pooling that slides over them puts a floor division around them, and
windows a remainder, until torch takes minutes to compare two sizes (two stages of Swin: 84 s instead of 4),
and nothing can be proven of them.  What a one-dimensional convolution slides over (the samples of speech)
varies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_AXES = {
    "conv2d": 2,
    "conv3d": 3,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "max_pool2d": 2,
    "max_pool3d": 3,
    "im2col": 2,
}
"""Operators that slide over the last axes of their input, and over how many."""


class Slides(TorchFunctionMode):
    """While it is on, note the sizes that windows slide over along two or more axes.

    ``seen`` says by which operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[int, ...], str] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function; look at its input first."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _AXES:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, torch.Tensor):
                self.seen.setdefault(tuple(x.shape[-_AXES[name] :]), name)
        return func(*args, **kwargs)

    def over(self, x: torch.Tensor) -> tuple[range, str] | None:
        """Return the axes of an image ``x`` that windows slide over, and the operator; None if ``x`` is none.

        An image has at least four axes; that leaves the features of speech free, which some models convolve
        like images.
        """
        if x.ndim < 4:
            return None
        for sizes, name in self.seen.items():
            for start in range(1, x.ndim - len(sizes) + 1):
                axes = range(start, start + len(sizes))
                if tuple(x.shape[i] for i in axes) == sizes:
                    return axes, name
        return None


def free_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], slides: Slides
) -> tuple[Any, list[str]]:
    """Return the dynamic shapes for torch.export, and a note for each input of which some sizes are fixed."""
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    notes = []
    for path, leaf in pytree.tree_leaves_with_path((args, kwargs)):
        if not isinstance(leaf, torch.Tensor) or not leaf.ndim:
            continue
        axes, name = slides.over(leaf) or (range(0), "")
        free = [i for i, n in enumerate(leaf.shape) if n > 1 and i not in axes]
        shapes[leaf] = {i: torch.export.Dim.AUTO for i in free}
        if axes:
            notes.append(
                f"capture: {' x '.join(str(leaf.shape[i]) for i in axes)} of input {_name(path)} are fixed, "
                f"because {name} slides over them; inputs of other sizes are captured anew"
            )
    return shapes.dynamic_shapes(model, args, kwargs), notes


def _name(path: tuple[Any, ...]) -> str:
    """Return where an input is found: ``pixel_values``, ``0``, ``images.1``."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:])
