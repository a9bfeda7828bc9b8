"""Export a program to ONNX, each ``attnc::attend`` node as one fused operator where the runtime has one.

For each site the capability table of the target gives candidates; each is run alone in ONNX Runtime against
the executed spec, and the first that agrees is taken, basic operators at last.  The model is written beside
its destination, run on the check inputs, and renamed only when it agrees with the reference.  The same
program gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from attnc import logs
from attnc.codegen.onnx import lengths, names, parity, placing, runtime, table
from attnc.codegen.onnx.assemble import assemble, sign
from attnc.codegen.onnx.check import Checked, check_in_float32, check_site
from attnc.codegen.onnx.complex_numbers import without_complex
from attnc.codegen.onnx.linear import choose_form
from attnc.codegen.onnx.lower import Written
from attnc.codegen.onnx.missing import reworded
from attnc.codegen.onnx.native import attend_natively
from attnc.codegen.onnx.sites import Call
from attnc.codegen.onnx.translate import LINEAR, convert, find_calls, flat
from attnc.codegen.onnx.trials import Inputs, by_name, leaves
from attnc.errors import CodegenError

if TYPE_CHECKING:
    import onnx_ir as ir

log = logs.get("codegen")

EXTERNAL_AT = 1_800_000_000
"""Weights of more bytes go to a second file: a protobuf file holds 2 GiB at most."""


@dataclass(frozen=True, slots=True)
class SiteExport:
    """What one site became.

    ``error`` is its greatest difference from the executed spec in ONNX Runtime, in the output's units, on
    inputs made for it; ``reason`` says why earlier choices were not taken; ``table`` names the capability
    table.
    """

    index: int
    id: str
    operator: str
    domain: str
    reason: str
    attributes: dict[str, Any]
    error: float
    tolerance: float
    table: str

    @property
    def is_fused(self) -> bool:
        """The site is one operator that the runtime has."""
        return self.operator in ("MultiHeadAttention", "GroupQueryAttention", "Attention")


@dataclass(frozen=True, slots=True)
class Exported:
    """A written model: files, opset, sites, comparisons with the reference, and notes on the whole."""

    files: tuple[Path, ...]
    opset: int
    sites: tuple[SiteExport, ...]
    checks: tuple[parity.Parity, ...]
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Decision:
    """What a site becomes: its call, the row that was chosen, and how that ran alone."""

    call: Call
    choice: table.Choice
    checked: Checked


def export(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    target: table.Target = "ort-cpu",
    check_inputs: Sequence[Inputs] | None = None,
    reference: parity.Reference | None = None,
    **options: Any,
) -> list[SiteExport]:
    """Export as ``export_model`` does and return what each site became."""
    done = export_model(
        program, path, target=target, check_inputs=check_inputs, reference=reference, **options
    )
    return list(done.sites)


def export_model(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    target: table.Target = "ort-cpu",
    check_inputs: Sequence[Inputs] | None = None,
    reference: parity.Reference | None = None,
    dim_names: names.DimNames | None = None,
    tolerance: float | None = None,
    external_data: bool | None = None,
    force: bool = False,
    notes: Sequence[str] = (),
) -> Exported:
    """Write ``program`` to ``path`` as ONNX for ``target`` and say what was written.

    ``check_inputs`` are (args, kwargs) on which the file is run against ``reference`` (default: the program
    itself), and again at other sizes where they are dynamic (``parity``); None checks the sites alone.
    ``tolerance`` is absolute, None derives it. ``dim_names`` names dynamic sizes by input and axis.
    ``external_data`` None decides by size; ``notes`` go into the file's metadata.  Nothing is left at
    ``path`` unless all checks pass.

    Raises:
        CodegenError: a bad path or target, an operator without translation, a model that ONNX Runtime refuses
        or that disagrees.
    """
    path = Path(path)
    old = placing.check_free(path, force)
    _check_program(program)
    program = _prepared(program)
    calls = [by_name(program, *inputs) for inputs in check_inputs or ()]
    for args, kwargs in calls:
        leaves(program, args, kwargs)
    capabilities = table.load(target, runtime.version())
    decisions = decide(find_calls(program), capabilities)
    opset = max([capabilities.opset, *(d.choice.row.opset for d in decisions if d.choice.row)])
    base = convert(program, [d.call for d in decisions], opset)
    can_run = not any(d.checked.in_float32 for d in decisions)
    job = _Job(program, base, target, capabilities, opset, dim_names, can_run, notes)
    with placing.Sibling(path) as folder:
        temporary = folder / path.name
        sites, remarks = job.write(decisions, temporary, external_data)
        checks = _compared(job, temporary, calls, reference, tolerance)
        if any(not c.ok for c in checks) and any(d.choice.row for d in decisions):
            decisions = _all_basic(decisions, next(c for c in checks if not c.ok))
            sites, remarks = job.write(decisions, temporary, external_data)
            checks = _compared(job, temporary, calls, reference, tolerance)
        bad = [c for c in checks if not c.ok]
        if bad:
            raise CodegenError(
                f"ONNX export: the model disagrees with the reference: {bad[0]}; nothing was written"
            )
        files = placing.place(folder, path, old, force)
    for site in sites:
        log.info("%s: %s (%s)", site.id, site.operator, site.reason)
    return Exported(files, opset, tuple(sites), tuple(checks), remarks)


def _prepared(program: ExportedProgram) -> ExportedProgram:
    """Return the program as the exporter takes it: functional, of real numbers, SDPA calls as sites."""
    for step in (attend_natively, flat, without_complex, reworded):
        program = step(program)
    return lengths.write_known_sizes(program)


def _check_program(program: ExportedProgram) -> None:
    signature = program.graph_signature
    written = sorted({*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()})
    if written:
        raise CodegenError(
            f"ONNX export: expected a program that changes no state, found writes to {written}"
        )
    constants = [s.arg.value for s in signature.output_specs if isinstance(s.arg, ConstantArgument)]
    if any(c is not None for c in constants):
        raise CodegenError(f"ONNX export: expected outputs that are tensors or None, found {constants}")


def decide(calls: Sequence[Call], capabilities: table.Table) -> list[Decision]:
    """Take for each site the first candidate that agrees with its spec; equal sites are decided once."""
    known: dict[tuple[Any, ...], Decision] = {}
    out = []
    for call in calls:
        key = (call.text, call.heads, call.head_sizes, call.lengths, call.last, call.lse_used)
        if key not in known:
            known[key] = _decide_one(call, capabilities)
        out.append(replace(known[key], call=call))
    return out


def _decide_one(call: Call, capabilities: table.Table) -> Decision:
    failed: list[str] = []
    for choice in table.candidates(call, capabilities):
        opset = max(capabilities.opset, choice.row.opset if choice.row else 0)
        checked = check_site(call, choice.row, opset)
        if checked.refused and not capabilities.measured:
            checked = check_in_float32(call, choice.row, opset)
        if checked.ok:
            reason = "; ".join(failed) if failed else choice.reason
            if choice.row is not None and not choice.row.measured:
                reason += f"; not run on {capabilities.provider}"
            return Decision(call, table.Choice(choice.row, reason), checked)
        name = choice.row.name if choice.row else "basic operators"
        why = checked.refused or f"error {checked.error:.1e} is over {checked.tolerance:.1e}"
        failed.append(f"{name} disagrees with the spec: {why}")
        log.warning("%s: %s", call.id, failed[-1])
    raise CodegenError(f"ONNX export, site {call.id}: {'; '.join(failed)}; the spec is {call.text}")


def _all_basic(decisions: Sequence[Decision], bad: parity.Parity) -> list[Decision]:
    """Choose basic operators for every site, because the whole model disagreed."""
    log.warning("fused operators are given up: %s", bad)
    choice = table.Choice(None, f"the whole model disagreed with fused operators: {bad}")
    return [replace(d, choice=choice) for d in decisions]


@dataclass(frozen=True, slots=True)
class _Job:
    """What stays the same when a model is written a second time with other choices."""

    program: ExportedProgram
    base: ir.Model
    target: table.Target
    capabilities: table.Table
    opset: int
    dim_names: names.DimNames | None
    can_run: bool
    notes: Sequence[str]

    def write(
        self, decisions: Sequence[Decision], path: Path, external: bool | None
    ) -> tuple[list[SiteExport], tuple[str, ...]]:
        """Write the model with these choices; return its sites and notes."""
        linears = sum(n.op_type == LINEAR for n in self.base.graph)
        form = choose_form(self.capabilities.family) if linears else None
        model, written = assemble(
            self.base,
            [d.call for d in decisions],
            [d.choice.row for d in decisions],
            form,
            self.opset,
            inline=self.capabilities.is_standard,
        )
        names.rename_inputs(model, self.program)
        names.rename_outputs(model, names.output_names(self.program))
        names.rename_sizes(model, names.size_names(self.program, self.dim_names))
        sites = [site_export(d, w, self.capabilities.name) for d, w in zip(decisions, written, strict=True)]
        notes = [*self.notes, *filter(None, [self.capabilities.note])]
        if not self.can_run:
            notes.append("the file was not run: no kernels for its types on the CPU provider")
        if form is not None:
            notes.append(f"{linears} integer linears: {form.reason}")
        certificates = [certificate(s, d.call.text) for s, d in zip(sites, decisions, strict=True)]
        sign(model, self.target, self.opset, {"sites": certificates, "notes": notes})
        _save(model, path, external)
        return sites, tuple(notes)


def site_export(d: Decision, w: Written, capabilities: str) -> SiteExport:
    """Return what one site became."""
    return SiteExport(
        d.call.index,
        d.call.id,
        w.operator,
        w.domain,
        d.choice.reason,
        w.attributes,
        d.checked.error,
        d.checked.tolerance,
        capabilities,
    )


def certificate(site: SiteExport, spec: str) -> dict[str, Any]:
    """Return the site's line of the file's metadata; errors are rounded to what is meant by them."""
    out = asdict(site) | {"spec": spec}
    return out | {"error": f"{site.error:.1e}", "tolerance": f"{site.tolerance:.1e}"}


def _save(model: ir.Model, path: Path, external: bool | None) -> None:
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    placing.save(model, path, size > EXTERNAL_AT if external is None else external)


def _compared(
    job: _Job,
    path: Path,
    inputs: Sequence[Inputs],
    reference: parity.Reference | None,
    tolerance: float | None,
) -> list[parity.Parity]:
    return parity.compare(path, job.program, inputs, reference, tolerance) if job.can_run else []
