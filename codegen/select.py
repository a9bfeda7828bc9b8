"""Choose a backend for a spec: the first that can run it, in order of preference for the target.

``reference`` (the ``attend`` op itself, an executed spec) can run everything, so every site has a backend; it
is not faster than the user's code, and the cost model may leave such a site alone.
"""

from __future__ import annotations

from collections.abc import Callable

from attnc.codegen import flex, sdpa
from attnc.ir import AttentionSpec, Miss

Check = Callable[[AttentionSpec, str], Miss | None]

BACKENDS: tuple[tuple[str, Check], ...] = (
    ("sdpa", lambda spec, device: sdpa.can_run(spec)),
    ("flex", flex.can_run),
    ("reference", lambda spec, device: None),
)


def select(
    spec: AttentionSpec, target: str, allow: frozenset[str] | None = None
) -> tuple[str, tuple[Miss, ...]]:
    """Return the backend's name and why those before it in the order were passed over.

    ``target`` is ``cpu``, ``cuda`` or ``cuda:sm_90``; ``allow`` limits the names.
    """
    passed: list[Miss] = []
    device = target.partition(":")[0]
    for name, check in BACKENDS:
        if allow is not None and name not in allow:
            continue
        miss = check(spec, device)
        if miss is None:
            if name == "reference" and device == "cuda":
                return "triton", tuple(passed)
            return name, tuple(passed)
        passed.append(miss)
    return "reference", tuple(passed)
