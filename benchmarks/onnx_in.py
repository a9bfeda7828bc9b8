"""How much of what the PyTorch door rewrites the ONNX door rewrites, from file to file.

    python benchmarks/onnx_in.py
    python benchmarks/onnx_in.py --only 'hf/(bert|llama)' --models 900

Models are drawn from the corpus' zoo by a hash of their names, and all spellings are taken.  Each is exported
by torch's two exporters as a user would, opset 18: ``dynamo=True`` with its default optimizer, and
``dynamo=False``; sizes of batch and length are free where the exporter allows it.  The file is rewritten
(``attnc.optimize_onnx``, ``cost_model=False``), run in ONNX Runtime beside the original, and its rewritten
sites are counted beside those of ``attnc.optimize(model, cost_model=False)``.  A model that an exporter
cannot export does not count for it.  Every model runs in a process of its own; rows are kept in
``build/onnx_in`` and used again while attnc's sources are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from corpus import ROOT, TOOLS, Corpus
from isolated import isolated
from machine import about
from torch import nn

RESULTS = ROOT / "benchmarks" / "results" / "onnx_in.json"
KEPT = ROOT / "build" / "onnx_in"
EXPORTERS = ("dynamo", "torchscript")
LIMIT = 300
Row = dict[str, Any]


class Flat(nn.Module):
    """A model with tensors as inputs by position and a flat tuple of tensors as outputs."""

    def __init__(self, model: nn.Module, names: list[str], fixed: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, names, fixed

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the model."""
        return tuple(tensors(self.model(**dict(zip(self.names, args, strict=True)), **self.fixed)))


def tensors(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of an output, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    items = tree.values() if hasattr(tree, "values") else tree if isinstance(tree, list | tuple) else ()
    return [t for x in items for t in tensors(x)]


def drawn(names: list[str], count: int) -> list[str]:
    """Return ``count`` names, the same in every run."""
    return sorted(names, key=lambda n: hashlib.sha256(f"onnx_in/{n}".encode()).digest())[:count]


def loaded(corpus: Corpus, job: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model in eval mode and its keyword inputs."""
    kind, _, name = job.partition("/")
    if kind != "spelling":
        model, inputs, _ = corpus.zoo().load(job)
        if "use_cache" in model.forward.__code__.co_varnames:
            inputs = {**inputs, "use_cache": False}
        return model.eval(), inputs
    runner = corpus.spellings()
    model = runner.Case(name).eval()
    args = runner.inputs(name)
    names = list(model.forward.__code__.co_varnames)[1 : 1 + len(args)]
    if model.forward.__code__.co_flags & 0x04:  # *args
        return Named(model, len(args)), {f"x{i}": a for i, a in enumerate(args)}
    return model, dict(zip(names, args, strict=True))


class Named(nn.Module):
    """A model of positional inputs, by keyword."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model, self.count = model, count

    def forward(self, **inputs: torch.Tensor) -> Any:
        """Run the model."""
        return self.model(*(inputs[f"x{i}"] for i in range(self.count)))


def exported(model: nn.Module, inputs: dict[str, Any], path: Path, exporter: str) -> None:
    """Export as a user would; fixed sizes where free ones cannot be."""
    given = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    fixed = {k: v for k, v in inputs.items() if not isinstance(v, torch.Tensor)}
    flat, args = Flat(model, list(given), fixed).eval(), tuple(given.values())
    axes = {k: {0: "batch", **({1: "length"} if v.dim() == 2 else {})} for k, v in given.items()}
    if exporter == "torchscript":
        _either(
            lambda free: torch.onnx.export(
                flat,
                args,
                path,
                dynamo=False,
                opset_version=18,
                input_names=list(given),
                dynamic_axes=axes if free else None,
            )
        )
        return
    auto = torch.export.Dim.AUTO
    shapes = (tuple(dict.fromkeys(axes[k], auto) for k in given),)
    _either(
        lambda free: torch.onnx.export(
            flat,
            args,
            path,
            dynamo=True,
            opset_version=18,
            verbose=False,
            dynamic_shapes=shapes if free else None,
        )
    )


def _either(export: Callable[[bool], Any]) -> None:
    try:
        export(True)
    except Exception:
        export(False)


def measure(corpus: Corpus, job: str) -> Row:
    """Return what either door does with one model."""
    import attnc
    from attnc.onnx_file import rewrite_onnx

    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    try:
        model, inputs = loaded(corpus, job)
    except Exception as e:
        return {"status": "not loaded", "why": _said(e)}
    try:
        fast = attnc.optimize(model, (), inputs, cost_model=False)
        row: Row = {"torch": fast.report.counts()["rewritten"]}
    except Exception as e:
        return {"status": "torch door raised", "why": _said(e)}
    for exporter in EXPORTERS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            try:
                exported(model, inputs, path, exporter)
            except Exception as e:
                row[exporter] = {"status": "not exported", "why": _said(e)}
                continue
            try:
                report = rewrite_onnx(path, Path(folder) / "out.onnx", cost_model=False).report
                others = [f"{s.status}: {s.reason}"[:160] for s in report.sites if s.status != "rewritten"]
                row[exporter] = {
                    "status": "ok",
                    "rewritten": report.counts()["rewritten"],
                    "operators": sorted({s.backend for s in report.sites if s.backend}),
                    "others": others,
                    "max_error": report.checks.get("max_error"),
                    "warnings": [w[:160] for w in report.warnings],
                }
            except Exception as e:
                row[exporter] = {"status": "raised", "why": _said(e)}
    return {"status": "ok", **row}


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:240]


def summary(rows: list[Row]) -> Row:
    """Return per exporter: models, their sites by the PyTorch door, and those that the ONNX door rewrote.

    A model counts at most with the sites that the PyTorch door has: extra ones make up for none.
    """
    out: Row = {}
    for exporter in EXPORTERS:
        there = [r for r in rows if r.get("torch") and r.get(exporter, {}).get("status") in ("ok", "raised")]
        sites = sum(r["torch"] for r in there)
        found = sum(min(r[exporter].get("rewritten", 0), r["torch"]) for r in there)
        out[exporter] = {
            "models": len(there),
            "sites": sites,
            "rewritten": found,
            "share": round(found / sites, 4) if sites else None,
            "raised": sum(r[exporter]["status"] == "raised" for r in there),
            "not_exported": sum(r.get(exporter, {}).get("status") == "not exported" for r in rows),
        }
    return out


def rows_of(corpus: Corpus, jobs: list[str], fresh: bool) -> list[Row]:
    """Return a row per job; those of an unchanged attnc are used again."""
    KEPT.mkdir(parents=True, exist_ok=True)
    stamp = corpus.fingerprint(TOOLS[0])
    out = []
    for i, job in enumerate(jobs, 1):
        file = KEPT / f"{job.replace('/', '+')}.json"
        row = json.loads(file.read_text()) if file.is_file() and not fresh else {}
        if row.get("stamp") != stamp:
            row = {"name": job, "stamp": stamp, **isolated(partial(measure, corpus, job), LIMIT)}
            file.write_text(json.dumps(row))
        out.append({k: v for k, v in row.items() if k != "stamp"})
        print(f"{i} of {len(jobs)} {job}: {_line(row)}", flush=True)
    return out


def _line(row: Row) -> str:
    parts = [f"torch {row.get('torch')}"]
    for exporter in EXPORTERS:
        found = row.get(exporter, {})
        parts.append(f"{exporter} {found.get('rewritten', found.get('status'))}")
    return ", ".join(parts) if row.get("status") == "ok" else f"{row.get('status')}: {row.get('why')}"


def main() -> None:
    """Measure and write the results; with ``--only`` nothing is written."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--corpus", type=Path, default=ROOT.parent / "shared")
    p.add_argument("--models", type=int, default=60, help="how many zoo models are drawn")
    p.add_argument("--only", default="", help="names that match this, of those drawn")
    p.add_argument("--fresh", action="store_true", help="use no kept row")
    a = p.parse_args()
    corpus = Corpus(a.corpus)
    groups = {
        "zoo": drawn(corpus.zoo_names(1), a.models),
        "spellings": [f"spelling/{n}" for n in corpus.spelling_names()],
    }
    result: Row = {"about": about("torch", "transformers", "onnx", "onnxruntime")}
    for group, jobs in groups.items():
        rows = rows_of(corpus, [j for j in jobs if re.search(a.only, j)], a.fresh)
        result[group] = {"summary": summary(rows), "rows": rows}
        print(group, json.dumps(result[group]["summary"], indent=1))
    if not a.only:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
