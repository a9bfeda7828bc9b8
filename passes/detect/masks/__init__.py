"""Mask lifting: from a symbolic condition over (b, h, q, k) to a predicate tree."""

from attnc.passes.detect.masks.lift import Lifted, lift

__all__ = ["Lifted", "lift"]
