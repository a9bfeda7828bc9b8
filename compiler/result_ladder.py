"""Serve the kinds of call whose capture as a whole fails: through Dynamo, then submodule by submodule.

The first such call goes through Dynamo.  What Dynamo then left out (frames that it skips or may not enter, or
everything, where it raises) is captured by submodules: each of the largest ones that can be captured gets a
dispatcher of its own, in the result only.  Later calls run the forward that this leaves, compiled or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from attnc import logs
from attnc.capture.names import Watch
from attnc.capture.pieces import Coverage, capture_pieces, first_calls
from attnc.result_lazy import LazyForward

log = logs.get("capture")

BuildPiece = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], "ExportedProgram | None"]
Prepare = Callable[[str, tuple[Any, ...], dict[str, Any]], str]


@dataclass(frozen=True)
class Doors:
    """The ways to capture that are left when a whole capture fails.

    Attributes:
        backend: a Dynamo backend.
        watch: what that backend was given.
        piece: captures the submodule at a path; None means that it holds no attention.
        settled: told how the modules were captured, once that is known for a kind of call.
    """

    backend: Callable[..., Any]
    watch: Watch | None = None
    piece: BuildPiece | None = None
    settled: Callable[[list[Coverage]], None] | None = None


class Ladder:
    """The fallback of one dispatcher."""

    def __init__(
        self,
        model: nn.Module,
        doors: Doors,
        *,
        plain: Callable[[], nn.Module],
        prepare: Prepare,
        tell: Callable[[str], None],
    ) -> None:
        """Serve calls of ``model``.

        ``plain`` returns the module without any captured program; ``prepare`` captures the submodule at a
        path for the kind of call given, and says why that failed, if it did.
        """
        self._model, self._doors, self._plain = model, doors, plain
        self._prepare, self._tell = prepare, tell
        self._lazy = LazyForward(model, doors.backend)
        self._settled: set[Any] = set()
        self._without_dynamo: set[Any] = set()

    def __call__(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the call as the class's forward would."""
        first = key not in self._settled
        self._settled.add(key)
        if key in self._without_dynamo:
            return self._lazy._original(*args, **kwargs)
        try:
            with _restored(self._model) if first else _as_it_is():
                out = self._lazy(*args, **kwargs)
        except Exception as error:
            if not first and not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise  # the model's own
            self._tell(f"Dynamo failed, and is not used for this kind of call: {_said(error)}")
            self._without_dynamo.add(key)
            self._settle(key, args, kwargs)
            return self._lazy._original(*args, **kwargs)
        if first:
            self._settle(key, args, kwargs)
        return out

    def _settle(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture by submodules what Dynamo has left out, and tell what was covered."""
        watch = self._doors.watch
        if watch is None or self._doors.piece is None:
            return
        used = key not in self._without_dynamo
        covered = watch.captured if used else (lambda path: False)
        try:
            calls = first_calls(self._plain(), args, kwargs)
        except Exception as error:  # the model's own, or one of its hooks: the call itself tells
            log.info("the inputs of submodules are not known: %s", _said(error))
            return
        found = capture_pieces(self._model, calls, covered, self._prepare)
        if self._doors.settled is not None:
            self._doors.settled([*_by_dynamo(watch, used), *found])


def _by_dynamo(watch: Watch, used: bool) -> Iterator[Coverage]:
    """Say what Dynamo captured, and which graphs run as they were."""
    if not used or not any(not reason for reason in watch.modules.values()):
        return
    yield Coverage("", "dynamo", f"{watch.graphs} graphs")
    left = {p: r for p, r in watch.modules.items() if r}
    for path, reason in left.items():
        if not any(path.startswith(other + ".") for other in left if other != path):
            yield Coverage(path, "none", reason)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore the random state and the buffers if the block raises, so that the call can run again."""
    random = torch.get_rng_state()
    kept = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    try:
        yield
    except Exception:
        torch.set_rng_state(random)
        with torch.no_grad():
            for buffer, value in kept:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        raise


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
