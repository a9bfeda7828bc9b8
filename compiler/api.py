"""The Python surface: optimize, inspect, session, and the doors to saving, ONNX and kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from attnc import __version__, logs
from attnc.capture.names import Watch
from attnc.capture.pieces import Coverage, put_below
from attnc.capture.trial import ForwardError
from attnc.capture.types import Captured
from attnc.capture.whole import capture_export, capture_exported, make_backend
from attnc.errors import CaptureError, RewriteError, UnknownSiteError
from attnc.ir import Miss
from attnc.ledger import Ledger
from attnc.passes.rewrite.forms import Forms, parse_forms
from attnc.passes.rewrite.quant.w8a8 import W8A8
from attnc.past import holds_cache, with_past
from attnc.past_cache import is_opened
from attnc.pipeline import Options, Outcome, run
from attnc.programs import placeholder_values
from attnc.records import INTERNAL, leave, said
from attnc.report.report import Report
from attnc.result import clone_module, make_result
from attnc.result_ladder import Doors
from attnc.result_lazy import InstanceForward
from attnc.session import Session, reference, session

if TYPE_CHECKING:
    from attnc.ir import Kernel

__all__ = [
    "Session",
    "dynamo_rewriter",
    "emit",
    "export_onnx",
    "inspect",
    "optimize",
    "parse_forms",
    "session",
]

log = logs.get("capture")
Progress = Callable[[str, float], None]
_TARGETS = ("cpu", "cuda")
_FAR = 8.0
"""How many tolerances a SAME model may be off as a whole before it is put back.

Errors of sites add up and are not of one sign.
"""


def optimize(
    model: nn.Module | fx.GraphModule | ExportedProgram | str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    forms: Any = "fused",
    target: str | None = None,
    verify: bool = True,
    cost_model: bool = True,
    progress: Progress | None = None,
) -> nn.Module:
    """Return a module that computes what ``model`` does, with its attention sites rewritten.

    ``model`` stays as it was.

    Args:
        model: a module, an ``fx.GraphModule``, an ``ExportedProgram``, or a path (Hugging Face directory,
            ``.pt2``, ``file.py:callable``).
        args: example positional inputs; without any inputs a module is captured at its first call, as
            torch.compile does.
        kwargs: example keyword inputs.
        dynamic_shapes: "auto" lets every size vary that can; None fixes all; anything else goes to
            torch.export.
        forms: what is allowed: "fused" (SAME only), a form, a list, or a mapping from module-path patterns to
            forms.
        target: "cpu", "cuda" or "cuda:sm_90"; None is the model's device.
        verify: check every rewritten site against the original and put back those that fail.
        cost_model: leave sites alone whose rewrite is predicted to be slower; False rewrites all that can be.
        progress: called with (stage, fraction) as stages begin.

    Returns:
        a module of the same class sharing the model's tensors (those of quantized layers excepted), with a
        ``.report``.

    Raises:
        CaptureError: the forward fails on the example inputs.
        RewriteError: an unknown form, a bad option, or a pattern that names no site.
    """
    allowed = parse_forms(forms)
    source = None
    if isinstance(model, str | os.PathLike):
        from attnc.opening import open_model

        source = open_model(os.fspath(model))
        model = source.model
        if not args and not kwargs:
            args, kwargs = source.args, source.kwargs
    if isinstance(model, ExportedProgram):
        return _optimize_program(
            model, allowed, _target(target, model.state_dict.values()), verify, cost_model, progress
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"optimize: expected a module, an ExportedProgram or a path, found {type(model).__name__}"
        )
    device = _target(target, model.parameters())
    report = Report(__version__, type(model).__name__, device)
    state = Session(allowed, device, args, dict(kwargs or {}), report, dynamic_shapes, source=source)
    report.warnings += source.warnings if source is not None else []
    work = _Work(state, verify, cost_model, progress)
    fast = work.ahead(model) if args or kwargs else work.lazy(model)
    fast.__dict__["_attnc"] = state
    return fast


def inspect(
    model: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    forms: Any = "fused",
    target: str | None = None,
    progress: Progress | None = None,
    draw: bool = False,
) -> Report:
    """Return what ``optimize`` would find and plan, changing and verifying nothing.

    ``draw`` adds what ``Report.to_html`` draws of each site. Needs example inputs.  Raises as ``optimize``.
    """
    if isinstance(model, str | os.PathLike):
        from attnc.opening import open_model

        opened = open_model(os.fspath(model))
        model, args, kwargs = opened.model, args or opened.args, kwargs or opened.kwargs
    captured = (
        capture_exported(model) if isinstance(model, ExportedProgram) else capture_export(model, args, kwargs)
    )
    tensors = model.state_dict.values() if isinstance(model, ExportedProgram) else model.parameters()
    device = _target(target, tensors)
    outcome = run(captured, Options(parse_forms(forms), device, verify=False, progress=progress, draw=draw))
    report = Report(__version__, type(model).__name__, device)
    Ledger(report).add(outcome, captured)
    return report


def export_onnx(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str = "ort-cpu",
    force: bool = False,
    cache: bool = False,
    progress: Progress | None = None,
) -> list[Any]:
    """Write an ONNX file in which each rewritten site is the best operator of ``target``.

    Return what each site became.

    ``model`` is a result of ``optimize`` or anything ``optimize`` takes.  The file is run in ONNX Runtime
    against the model before it gets its name.  With ``cache``, or where a cache of transformers is among the
    inputs, a decoder's keys and values of earlier positions go in as ``past_key_values.0.key`` and so on and
    come out as ``present.0.key``; one file then serves the prompt (no positions yet) and every later step
    (``attnc.past``; of an encoder-decoder it holds the decoder).

    Raises:
        CaptureError: ``cache`` for what is no decoder of transformers, or one whose cache cannot be opened.
        CodegenError: the conversion failed, or the file disagrees with the model.
        CheckpointError: the path exists and ``force`` is not given, or cannot be written.
    """
    from attnc.codegen.onnx.export import export
    from attnc.codegen.onnx.lengths import check_free
    from attnc.passes.normalize.projections import separate_projections

    if cache or holds_cache(args, kwargs):
        model, kwargs = with_past(model, args, kwargs)
        args = ()
    fast = (
        model
        if isinstance(model, nn.Module) and "_attnc" in model.__dict__
        else optimize(model, args, kwargs, cost_model=False, progress=progress)
    )
    state = session(fast)
    notes: list[str] = []
    if not state.attends:
        fast, notes = _with_fixed_values(fast, state)
        state = session(fast)
    if is_opened(fast):
        check_free(state.attends[0])
    program = state.attends[0]
    return export(
        separate_projections(program) if target.startswith("ort-cpu") else program,
        Path(path),
        target=cast(Any, target),
        force=force,
        check_inputs=[(state.args, state.kwargs)],
        reference=reference(fast),
        notes=notes,
    )


def _with_fixed_values(fast: nn.Module, state: Session) -> tuple[nn.Module, list[str]]:
    """Capture a model whole by fixing the values that it turns into sizes; return it and notes that say so.

    Raises:
        RewriteError: there are no such values, or the model cannot be captured with them either.
    """
    from attnc.fixed_values import fix_values, followed_constants

    found = fix_values(fast, state.args, state.kwargs) if state.args or state.kwargs else None
    if found is not None:
        module, rest, values = found
        with followed_constants():
            fast = optimize(module, (), rest, forms=state.forms, cost_model=False)
        if session(fast).attends:
            notes = [f"{n} is fixed to {v}: the model makes sizes of it" for n, v in values.items()]
            for note in notes:
                log.warning("export_onnx: %s", note)
            return fast, notes
    raise RewriteError(
        "export_onnx: expected a model optimized with example inputs, found one not captured whole"
    )


def emit(
    model: nn.Module | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    kinds: Sequence[str] = ("forward",),
    force: bool = False,
) -> list[Kernel]:
    """Write one readable, self-contained Triton file per distinct kernel of ``model``'s sites; return them.

    ``kinds``: ``forward``, ``backward``, ``decode``, ..; all are in ``attnc.codegen.triton.kinds.KINDS``.

    Raises:
        UnsupportedError: no site can be emitted.
        CheckpointError: the directory exists and ``force`` is not given, or cannot be written.
    """
    from attnc.kernel_files import write_kernels

    has_sites = isinstance(model, nn.Module) and "_attnc" in model.__dict__
    fast: Any = model if has_sites else optimize(model, cost_model=False)
    return write_kernels(session(fast).report.sites, Path(directory), kinds, force=force)


def dynamo_rewriter(**options: Any) -> Callable[[Captured], bool]:
    """Return the rewriter behind ``torch.compile(model, backend="attnc", options={...})``.

    Options are those of ``optimize``.
    """
    report = Report(__version__, "compiled", str(options.get("target") or "cpu"))
    known = {"forms", "target", "verify", "cost_model"}
    if set(options) - known:
        raise RewriteError(
            f"torch.compile(backend='attnc'): expected options among {sorted(known)}, "
            f"found {sorted(set(options) - known)}"
        )
    forms = parse_forms(options.get("forms", "fused"))
    state = Session(forms, report.target, (), {}, report)
    return _Work(state, options.get("verify", True), options.get("cost_model", True), None).rewrite


def _optimize_program(
    program: ExportedProgram,
    forms: Forms,
    target: str,
    verify: bool,
    cost_model: bool,
    progress: Progress | None,
) -> nn.Module:
    """Rewrite an ExportedProgram; the result is its module."""
    captured = capture_exported(program)
    outcome = run(
        captured, Options(forms, target, verify, cost_model, False, progress), placeholder_values(program)
    )
    report = Report(__version__, "ExportedProgram", target)
    Ledger(report).add(outcome, captured)
    assert outcome.runtime is not None
    outcome.runtime.graph_module.recompile()
    fast = outcome.runtime.module()
    args, kwargs = program.example_inputs or ((), {})
    fast.__dict__["report"] = report
    fast.__dict__["_attnc"] = Session(forms, target, args, dict(kwargs), report, outcomes=[outcome])
    return fast


class _Work:
    """Capture and rewrite for one result, whenever it meets a new kind of call."""

    def __init__(self, state: Session, verify: bool, cost_model: bool, progress: Progress | None) -> None:
        self.state, self.verify, self.cost_model, self.progress = state, verify, cost_model, progress
        self.ledger = Ledger(state.report)
        self.watch = Watch(reused=self.ledger.repeat, named=self.ledger.name)
        self.whole = False
        self._failure: ForwardError | None = None

    def ahead(self, model: nn.Module) -> nn.Module:
        """Capture now, with the session's example inputs.

        A model that cannot be captured whole is compiled piece by piece.
        """
        clone = clone_module(model)
        self._quantize(clone)
        doors = Doors(self._backend(), self.watch, self.build_piece, self.ledger.cover)
        fast = make_result(clone, self._build_or_note, fallback=doors, report=self.state.report)
        self.watch.model = fast
        try:
            with torch.no_grad(), _same_random_numbers():
                fast(*self.state.args, **self.state.kwargs)
        except Exception as error:
            if self._failure is not None:
                raise self._failure from error
            raise
        if not self.whole:
            self.state.forms.check([s.id for s in self.state.report.sites])
        if self.verify:
            self._check_model(model, fast)
        return fast

    def lazy(self, model: nn.Module) -> nn.Module:
        """Capture at the first call, piece by piece."""
        clone = clone_module(model)
        if any(f.scope == "projections" for f in self.state.forms.of(W8A8)):
            raise RewriteError("w8a8(scope='projections'): expected example inputs, or scope='all'")
        self._quantize(clone)
        fast = make_result(clone, None, lazy=self._backend(), report=self.state.report)
        self.watch.model = fast
        return fast

    def _backend(self) -> Any:
        """Return the Dynamo backend that rewrites each piece and tells the report about it."""
        report = self.state.report
        return make_backend(self.rewrite, declined=report.warnings.append, watch=self.watch)

    def build(self, plain: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
        """Capture one program and run the pipeline on it."""
        self._tell("capture")
        captured = capture_export(plain, args, kwargs, dynamic_shapes=self.state.dynamic_shapes)
        assert captured.exported is not None
        outcome = self._run(
            captured, _trains(plain), placeholder_values(captured.exported, (args, dict(kwargs)))
        )
        self.state.outcomes.append(outcome)
        self.whole = True
        self.ledger.cover([Coverage("", "whole")])
        assert outcome.runtime is not None
        return outcome.runtime

    def build_piece(
        self, path: str, plain: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> ExportedProgram | None:
        """Capture the submodule at ``path`` by itself; None if it holds no attention.

        Its free sizes are free: what was asked for names the model's inputs, not its.
        """
        captured = capture_export(plain, args, kwargs, dynamic_shapes="auto" if self._free else None)
        assert captured.exported is not None
        put_below(path, captured)
        placeholders = placeholder_values(captured.exported, (args, dict(kwargs)))
        outcome = self._run(captured, _trains(plain), placeholders, whole=False)
        return outcome.runtime if outcome.records else None

    @property
    def _free(self) -> bool:
        return self.state.dynamic_shapes is not None

    def _build_or_note(
        self, plain: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> ExportedProgram:
        """Build; remember that the model's own forward failed.

        Which the dispatcher leaves to the forward to raise.
        """
        try:
            return self.build(plain, args, kwargs)
        except ForwardError as e:
            self._failure = e
            raise

    def rewrite(self, captured: Captured) -> bool:
        """Edit one graph at the dynamo door; say whether anything changed."""
        trains = any(v is not None and v.requires_grad for v in captured.tensors.values())
        self.ledger.cover([Coverage("", "dynamo")])
        return self._run(captured, trains, None, whole=False).rewritten > 0

    def _run(
        self, captured: Captured, trains: bool, placeholders: Mapping[str, Any] | None, *, whole: bool = True
    ) -> Outcome:
        """Run the pipeline; a graph on which a stage raises stays as it was, with a warning."""
        state = self.state
        options = Options(
            state.forms, state.target, self.verify, self.cost_model, trains, self.progress, whole=whole
        )
        try:
            outcome = run(captured, options, placeholders)
        except UnknownSiteError:
            raise
        except Exception as error:  # a mistake of ours must not take the user's model down
            log.warning("a stage raised", exc_info=error)
            text = f"{INTERNAL}: {said(error)}; a graph of {len(captured.graph.nodes)} nodes runs as it was"
            outcome = Outcome([], [], 0, captured.exported, warnings=[text])
        self.ledger.add(outcome, captured)
        return outcome

    def _quantize(self, clone: nn.Module) -> None:
        """Swap the linear layers that a W8A8 form covers, in the clone."""
        wanted = self.state.forms.of(W8A8)
        if not wanted:
            return
        from attnc.codegen.int8.swap import quantize_modules

        if any(f.scope == "all" for f in wanted):
            names = [n for n, m in clone.named_modules() if type(m) is nn.Linear]
        else:
            captured = capture_export(
                clone, self.state.args, self.state.kwargs, dynamic_shapes=self.state.dynamic_shapes
            )
            names = run(captured, Options(self.state.forms, self.state.target, verify=False)).linears
        done = quantize_modules(clone, names)
        self.state.quantized = tuple(done)
        self.state.report.linears = [{"module": n, "form": "w8a8", "contract": "BOUNDED"} for n in done]
        if not done:
            self.state.report.warnings.append("w8a8: no linear layer around an attention site was found")

    def _check_model(self, model: nn.Module, fast: nn.Module) -> None:
        from attnc.verify.sites import check_model

        self._tell("check")
        bounded = bool(self.state.quantized) or any(
            s.contract == "BOUNDED" for s in self.state.report.sites if s.status == "rewritten"
        )
        report = self.state.report
        with torch.no_grad(), _same_random_numbers():
            report.checks = check_model(model, fast, self.state.args, self.state.kwargs, bounded=bounded)
        error, tolerance = report.checks.get("error"), report.checks.get("tolerance")
        far = report.checks.get("unequal") or (
            error is not None and tolerance is not None and not error <= _FAR * tolerance
        )
        if not bounded and far:
            self._put_back(fast, str(report.checks.get("reason")))

    def _put_back(self, fast: nn.Module, reason: str) -> None:
        """Give the result the original forward.

        As a whole it is not the same function, whatever its sites are.
        """
        for module in fast.modules():
            if isinstance(vars(module).get("forward"), InstanceForward):
                del module.__dict__["forward"]
        self.state.outcomes.clear()
        self.state.report.warnings.append(
            f"the rewritten model disagrees with the original and was put back: {reason}"
        )
        for site in self.state.report.sites:
            if site.status == "rewritten":
                leave(site, Miss("model-disagrees", "", f"whole model disagrees, put back: {reason}"))

    def _tell(self, stage: str) -> None:
        if self.progress is not None:
            self.progress(stage, 0.0)


def _trains(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())


def _target(target: str | None, tensors: Any) -> str:
    if target is None:
        first = next(iter(tensors), None)
        return str(first.device.type) if isinstance(first, torch.Tensor) else "cpu"
    if target.partition(":")[0] not in _TARGETS:
        raise RewriteError(f"optimize: expected target 'cpu', 'cuda' or 'cuda:sm_90', found {target!r}")
    return target


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
