"""All queries against all keys that they may see, in one pass: prefill, encoders, training's forward."""

from __future__ import annotations

from attnc.codegen.triton.configs import choose
from attnc.codegen.triton.holes import fill_holes
from attnc.codegen.triton.kinds.kind import Kind
from attnc.ir import Elementwise, RoundedSoftmax, SignedSoftmax, Softmax

KIND = Kind(
    "forward",
    "fwd.py.j2",
    choose,
    fill_holes,
    norms=(Softmax, SignedSoftmax, RoundedSoftmax, Elementwise),
    places="qkhb",
)
