"""The command line: ``attnc inspect | explain | forms | optimize | export | emit | verify | bench | doctor``.

Results go to stdout, everything else to stderr.  A failure is one line and an exit code that is not zero: 1
for what attnc refuses, 2 for wrong usage, 130 for an interrupt.  ``ATTNC_DEBUG=1`` shows the traceback as
well.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from attnc import logs
from attnc.cli_view import Screen
from attnc.errors import AttncError

INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find attention in a PyTorch model and rewrite it into checked, faster forms.",
    epilog="MODEL: a Hugging Face folder, a .pt2, or file.py:callable; inspect and optimize also take a "
    ".onnx. ATTNC_LOGS=help lists the logs.",
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face folder, .pt2, or file.py:callable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Where to write.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the output if it exists, once the new one is complete.")
]
Forms = Annotated[
    list[str] | None, typer.Option("--form", metavar="NAME", help="Form to allow; may be repeated.")
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="TOML file: module globs to forms.")
]
Attn = Annotated[
    str | None,
    typer.Option("--attn", metavar="eager|sdpa", help="Attention code of transformers to start from."),
]
Target = Annotated[
    str | None, typer.Option("--target", help="cpu, cuda, cuda:sm_90; by default this machine.")
]
Batch = Annotated[int, typer.Option(min=1, help="Sequences in the example inputs.")]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens in the example inputs.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report as a page, too.")]


@app.command()
def explain(
    code: Annotated[
        str | None, typer.Argument(metavar="[CODE]", help="A code of a report; without one, all are listed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a code of a report means and what would make the site a match."""
    from attnc.codes.known import codes, named

    screen = Screen(as_json)
    rows = list(codes().values()) if code is None else [named(code)]
    if code is None:
        screen.table(("code", "what to do"), [(r.code, r.advice) for r in rows])
    else:
        screen.prose(rows[0].text)
    screen.result({"codes": [asdict(r) for r in rows]})


@app.command()
def forms(
    form: Annotated[
        str | None, typer.Argument(metavar="[FORM]", help="The name of a form; without one, all are listed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what --form and plans may ask for, or say what a form computes, what bounds it, and whence."""
    from attnc.passes.rewrite.forms import about

    screen, rows = Screen(as_json), about(form)
    if form is None:
        cells = [
            (f"{r.name}({', '.join(r.options)})" if r.options else r.name, r.contract, r.summary)
            for r in rows
        ]
        screen.table(("form", "contract", "what it does"), cells)
    else:
        screen.prose(rows[0].text)
    screen.result({"forms": [asdict(r) for r in rows]})


@app.command()
def inspect(
    model: Model,
    form: Forms = None,
    plan: PlanFile = None,
    attn: Attn = None,
    target: Target = None,
    batch: Batch = 2,
    length: Length = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Show what each attention site computes and what would be done with it; change nothing."""
    from attnc import cli_onnx as onnx
    from attnc import cli_work as work

    screen = Screen(as_json)
    if work.is_saved(model):
        report = work.saved_report(model)
    elif onnx.is_onnx(model):
        onnx.check_options(model, form=form, plan=plan, attn=attn)
        with screen.working("inspect"):
            report = onnx.inspect_file(model, target)
    else:
        with screen.working("inspect") as progress:
            forms = work.read_forms(form or (), plan)
            report = work.inspect_model(model, forms, attn, target, (batch, length), progress, bool(html))
    _write_html(report, html)
    screen.report(report)
    screen.result(report.to_dict())


@app.command()
def optimize(
    model: Model,
    output: Output,
    form: Forms = None,
    plan: PlanFile = None,
    attn: Attn = None,
    target: Target = None,
    verify: Annotated[bool, typer.Option(help="Check every rewritten site against the original.")] = True,
    cost_model: Annotated[bool, typer.Option(help="Leave sites that would become slower.")] = True,
    batch: Batch = 2,
    length: Length = None,
    html: Html = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Rewrite a checkpoint and save it as a new directory with a manifest, or rewrite an ONNX file."""
    from attnc import cli_onnx as onnx
    from attnc import cli_work as work
    from attnc.checkpoint import save

    screen = Screen(as_json)
    work.check_output(output, model, force)
    report: Any
    if onnx.is_onnx(model):
        onnx.check_options(model, form=form, plan=plan, attn=attn)
        with screen.working("optimize"):
            report = onnx.rewrite_file(
                model, output, target, verify=verify, cost_model=cost_model, force=force
            )
    else:
        forms = work.read_forms(form or (), plan)
        with screen.working("optimize") as progress:
            opened = work.open_source(model, attn, (batch, length), progress)
            fast = work.optimize_opened(opened, forms, target, progress, verify=verify, cost_model=cost_model)
            progress("save")
            save(fast, output, force=force)
        report = fast.report
    _write_html(report, html)
    screen.report(report)
    screen.line(f"saved to {output}")
    screen.result({**report.to_dict(), "output": str(output)})


@app.command()
def export(
    model: Model,
    output: Output,
    target: Annotated[
        str,
        typer.Option(
            help="ort-cpu, ort-cuda: ONNX Runtime's fused operators; standard, standard-23, standard-24: "
            "ai.onnx of that opset (18)."
        ),
    ] = "ort-cpu",
    with_past: Annotated[
        bool,
        typer.Option(
            "--with-past", help="A decoder's keys and values go in and out; one file for all steps."
        ),
    ] = False,
    form: Forms = None,
    plan: PlanFile = None,
    attn: Attn = None,
    batch: Batch = 2,
    length: Length = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an ONNX model with one fused operator per site where the target has one."""
    from attnc import cli_work as work
    from attnc.api import export_onnx

    screen = Screen(as_json)
    work.check_output(output, model, force)
    forms = work.read_forms(form or (), plan)
    with screen.working("export") as progress:
        fast = work.ready(model, attn, (batch, length), forms, progress, with_past=with_past)
        progress(f"write {output.name}")
        became = export_onnx(fast, output, target=target, force=force)
    rows = work.exported_rows(became)
    screen.table(("site", "became", "why"), [(r["site"], r["became"], r["reason"]) for r in rows])
    screen.line(f"saved to {output}")
    screen.result({"output": str(output), "target": target, "sites": rows})


@app.command()
def emit(
    model: Model,
    output: Output,
    report: Annotated[
        bool, typer.Option("--report", help="Compile each kernel; show registers and memory.")
    ] = False,
    kind: Annotated[
        list[str] | None, typer.Option(help="forward (the default), backward, decode, ..; may be repeated.")
    ] = None,
    tune: Annotated[
        int | None, typer.Option(min=1, metavar="TOKENS", help="Measure tiles on this GPU for this length.")
    ] = None,
    form: Forms = None,
    plan: PlanFile = None,
    attn: Attn = None,
    batch: Batch = 2,
    length: Length = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write one readable, self-contained file per different kernel."""
    from attnc import cli_work as work

    screen = Screen(as_json)
    work.check_output(output, model, force)
    if tune is not None:
        work.check_tuning()
    forms = work.read_forms(form or (), plan)
    with screen.working("emit") as progress:
        fast = work.ready(model, attn, (batch, length), forms, progress)
        progress("write kernels")
        kernels = work.emit_kernels(fast, output, kind or ["forward"], force=force, tune=tune)
        figures = work.kernel_figures(kernels, progress) if report else []
    screen.table(("kernel", "key"), [(k.name, k.key) for k in kernels])
    if figures:
        shown = ("kernel", "program", "target", "registers", "shared", "stack", "spills", "error")
        screen.table(shown, [tuple("" if f[c] is None else str(f[c]) for c in shown) for f in figures])
    screen.line(f"saved to {output}")
    names = [{"name": k.name, "key": k.key} for k in kernels]
    screen.result({"output": str(output), "kernels": names, "compiled": figures})


@app.command()
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="The original: a model, or a saved directory.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What is to be checked against it.")],
    attn: Attn = None,
    atol: Annotated[
        float | None, typer.Option(help="Largest difference allowed; by default derived from fp64.")
    ] = None,
    min_cosine: Annotated[float, typer.Option(help="Smallest cosine allowed over the last axis.")] = -1.0,
    batch: Batch = 2,
    length: Length = None,
    as_json: Json = False,
) -> None:
    """Run two models on the same inputs and measure how far apart their outputs are; check hashes."""
    from attnc import cli_work as work
    from attnc.manifest import verify_files

    screen = Screen(as_json)
    with screen.working("verify") as progress:
        progress("hashes")
        hashed = {path: len(verify_files(path)) for path in (a, b) if work.is_saved(path)}
        progress(f"open {a}")
        first = work.open_subject(a, attn, work.sizes((batch, length)))
        progress(f"open {b}")
        second = work.open_subject(b, attn, work.sizes((batch, length)))
        progress("run")
        found = work.compare(first, second, atol)
    ok = found.within and found.cosine >= min_cosine
    for path, count in hashed.items():
        screen.line(f"{path}: {count} files match their hashes")
    limit = "none" if found.limit is None else f"{found.limit:.2e}"
    screen.line(f"max error {found.max_error:.2e} (limit {limit}; {found.note}), cosine {found.cosine:.7f}")
    screen.result({**asdict(found), "within": ok, "hashes": hashed})
    if not ok:
        wanted = f"error <= {limit}" if not found.within else f"cosine >= {min_cosine}"
        screen.note(
            f"attnc: error: {b}: expected {wanted}, found error {found.max_error:.2e}, cosine "
            f"{found.cosine:.7f}"
        )
        raise typer.Exit(1)


@app.command()
def bench(
    a: Annotated[str, typer.Argument(metavar="A", help="A model, or a saved directory.")],
    b: Annotated[
        str | None, typer.Argument(metavar="B", help="Another; by default A, optimized now.")
    ] = None,
    form: Forms = None,
    plan: PlanFile = None,
    attn: Attn = None,
    target: Target = None,
    batch: Batch = 8,
    length: Length = 128,
    rounds: Annotated[int, typer.Option(min=3, help="How often each is timed, in turns.")] = 21,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    as_json: Json = False,
) -> None:
    """Time two models in turns on the same inputs; print medians and their ratio with its spread."""
    from attnc import cli_work as work

    screen = Screen(as_json)
    forms = work.read_forms(form or (), plan)
    with screen.working("bench") as progress, work.threads(threads):
        progress("open")
        first, second = work.contestants(a, b, attn, work.sizes((batch, length)), forms, target, progress)
        timing = work.race(first, lambda: second.on(first.args, first.kwargs), work.counter(progress), rounds)
    rows = [(first.name, f"{timing.first_ms:.2f} ms"), (second.name, f"{timing.second_ms:.2f} ms")]
    screen.table(("model", "median"), rows)
    spread = f"{timing.low:.2f} to {timing.high:.2f}"
    screen.line(
        f"{timing.ratio:.2f} times as fast (quartiles {spread}; {timing.rounds} rounds, {timing.threads} "
        "threads)"
    )
    screen.result({"a": first.name, "b": second.name, **asdict(timing)})


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, processors, compilers, runtimes and caches, and what is missing."""
    from attnc.doctor import examine

    screen = Screen(as_json)
    with screen.working("doctor"):
        found = examine()
    style = {"ok": "", "missing": "yellow", "broken": "red"}
    rows = [(f.name, f.value, f.health, f.hint) for f in found]
    screen.table(("what", "found", "", "meaning"), rows, [style[f.health] for f in found])
    screen.result({"findings": [asdict(f) for f in found]})
    if any(f.health == "broken" for f in found):
        screen.note(f"attnc: error: broken: {', '.join(f.name for f in found if f.health == 'broken')}")
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    previous = _on_terminate()
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, to their developers
    try:
        text = logs.configure()
        if text is not None:
            print(text)
            return 0
        code = app(args=args, prog_name="attnc", standalone_mode=False)
        if code == INTERRUPTED:  # typer turns an interrupt into this code
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written", "Interrupted", INTERRUPTED, args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as e:
        return _report_failure(e, args)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _report_failure(e: Exception, args: Sequence[str]) -> int:
    """Show one line for an error; tell refusals, wrong usage and faults of our own apart."""
    if os.environ.get("ATTNC_DEBUG") == "1":
        raise e
    usage = getattr(e, "format_message", None)
    if usage is not None:
        if type(e).__name__ == "NoArgsIsHelpError":
            print(usage())
            return 2
        return _fail(usage(), "UsageError", int(getattr(e, "exit_code", 2)), args)
    if type(e).__name__ == "Abort":  # an interrupt, in older versions of typer
        return _fail("interrupted; nothing was left half-written", "Interrupted", INTERRUPTED, args)
    if isinstance(e, AttncError) or (isinstance(e, ValueError) and str(e).startswith("ATTNC_LOGS")):
        return _fail(str(e), type(e).__name__, 1, args)
    hint = "a fault in attnc; ATTNC_DEBUG=1 shows where, please report it"
    return _fail(f"{type(e).__name__}: {e} ({hint})", type(e).__name__, 70, args)


def _fail(message: str, kind: str, code: int, args: Sequence[str]) -> int:
    line = " ".join(message.split())
    if "--json" in args:
        print(json.dumps({"error": {"type": kind, "message": line}}), flush=True)
    print(f"attnc: error: {line}", file=sys.stderr, flush=True)
    return code


def _on_terminate() -> Any:
    """Let a polite kill clean up as an interrupt does; only the main thread may ask for that."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:
        return None


def _write_html(report: Any, path: Path | None) -> None:
    if path is not None:
        report.to_html(path)


if __name__ == "__main__":
    sys.exit(main())
