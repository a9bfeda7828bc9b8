"""What ``optimize`` remembers with its result: enough to save, export and emit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from attnc.errors import RewriteError
from attnc.passes.rewrite.forms import Forms
from attnc.pipeline import Outcome, portable
from attnc.report.report import Report
from attnc.result_lazy import InstanceForward

if TYPE_CHECKING:
    from attnc.opening import Opened


@dataclass
class Session:
    """What ``optimize`` remembers with its result: enough to save, export and emit it."""

    forms: Forms
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    report: Report
    dynamic_shapes: Any = "auto"
    outcomes: list[Outcome] = field(default_factory=list)
    quantized: tuple[str, ...] = ()
    source: Opened | None = None

    @property
    def plan(self) -> dict[str, Any]:
        """The forms as plain data."""
        return self.forms.to_plan()

    @property
    def attends(self) -> list[ExportedProgram]:
        """Captured programs with one ``attend`` node per rewritten site."""
        return [o.attend for o in self.outcomes if o.attend is not None]

    @property
    def programs(self) -> list[ExportedProgram]:
        """Captured programs lowered to plain ATen wherever a plain form exists."""
        return [portable(p) for p in self.attends]

    def packages(self, gpu: str) -> list[ExportedProgram]:
        """Return the captured programs as ``torch._inductor.aoti_compile_and_package`` takes them.

        Sites are plain ATen or Triton kernels emitted for ``gpu``, an architecture such as ``sm_90``; a
        package made of one runs without attnc.
        """
        return [portable(p, gpu) for p in self.attends]

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self


def session(fast: nn.Module) -> Session:
    """Return what ``optimize`` remembers with its result.

    Raises:
        RewriteError: the module did not come from ``optimize``.
    """
    state = fast.__dict__.get("_attnc")
    if not isinstance(state, Session):
        raise RewriteError(
            f"expected a module that attnc.optimize returned, found a plain {type(fast).__name__}"
        )
    return state


def reference(fast: nn.Module) -> Callable[..., Any]:
    """Return what a file made from ``fast`` is compared with: the original forward where that is the same.

    It takes sizes of 0 and 1 as they come, where ``fast`` would capture a program for each.
    """
    forward = vars(fast).get("forward")
    sites = session(fast).report.sites
    bounded = any(s.contract == "BOUNDED" and s.status == "rewritten" for s in sites)
    return forward.original if isinstance(forward, InstanceForward) and not bounded else fast
