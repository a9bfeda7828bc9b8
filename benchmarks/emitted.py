"""Which attention computations of the recognition corpus end as an emitted Triton kernel, and why not.

    python benchmarks/emitted.py CORPUS
    python benchmarks/emitted.py CORPUS --sample 3 --self-test --jobs 2
    python benchmarks/emitted.py CORPUS --only 'hf/(bert|llama)' --dtype bfloat16

CORPUS is the folder with ``spellings/`` and ``zoo/``.  Every model is inspected at its own sizes, in a
process of its own with a time limit.  Sites whose specs differ in names and in sizes no kernel depends on are
one computation; for each the table says whether a kernel is emitted, or the code and the reason of the miss.
``--self-test`` also runs each file's own test under Triton's interpreter.

Rows are kept in ``build/recognition`` until corpus, capture or detection change, so that a second run after a
change in ``codegen/`` is quick.  The results go to ``benchmarks/results/emitted.json``, but for those of a
run with ``--only`` or ``--dtype``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from corpus import ROOT, Corpus
from machine import about
from recognition import rows_of, warm

RESULTS = ROOT / "benchmarks" / "results" / "emitted.json"
SHOWN = 3
"""Examples of models per computation and per code."""
TIMEOUT = 600
"""Seconds for one file's own test."""
Row = dict[str, Any]


def call_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the corpus' inputs as positional and keyword arguments."""
    return ((), dict(inputs)) if isinstance(inputs, dict) else (tuple(inputs), {})


def model_of(corpus: Corpus, name: str) -> tuple[Any, Any]:
    """Return a model of the corpus in eval mode, and its inputs; ``spellings/CASE`` or a zoo's name."""
    kind, _, case = name.partition("/")
    if kind == "spellings":
        runner = corpus.spellings()
        return runner.Case(case).eval(), runner.inputs(case)
    model, inputs, _ = corpus.zoo().load(name)
    return model.eval(), inputs


def cast(value: Any, dtype: str) -> Any:
    """Return a model, or inputs in any nest, with what is floating in ``dtype``; '' leaves it as it is."""
    import torch
    from torch.utils import _pytree as pytree

    if not dtype:
        return value
    wanted = getattr(torch, dtype)
    if isinstance(value, torch.nn.Module):
        return value.to(wanted)
    floats = lambda t: t.to(wanted) if t.is_floating_point() else t  # noqa: E731
    return pytree.tree_map_only(torch.Tensor, floats, value)


def inspected(corpus: Corpus, dtype: str, name: str) -> Row:
    """Return the sites of one model: the spec if there is one, and the code and reason of a miss."""
    import torch

    import attnc

    try:
        model, inputs = model_of(corpus, name)
    except Exception as error:  # the corpus cannot build it here, or has no such variant
        return {"status": "skip", "why": f"{type(error).__name__}: {error}"[:200]}
    model, (args, kwargs) = cast(model, dtype), cast(call_of(inputs), dtype)
    with torch.no_grad():
        try:
            report = attnc.inspect(model, args, kwargs)
        except attnc.CaptureError:  # not as one graph: optimize goes on piece by piece
            try:
                report = attnc.optimize(model, args, kwargs, verify=False, cost_model=False).report
            except attnc.CaptureError as error:
                return {"status": "raised", "why": str(error)[:200]}
    sites = [
        {"spec": s.details.get("at_example", s.spec), "code": s.code, "reason": s.reason}
        for s in report.sites
    ]
    return {"status": "ok", "sites": sites}


def rows(corpus: Corpus, names: Iterable[str], a: argparse.Namespace) -> list[Row]:
    """Return one row per model of the corpus, kept ones first."""
    jobs = [n for n in names if re.search(a.only, n)]
    work = partial(inspected, corpus, a.dtype)
    found = rows_of(f"emitted{a.dtype}", jobs, stamp(a.corpus), work, a.limit, a.fresh)
    return [r for r in found if r.get("status") != "skip"]


def stamp(corpus: Path) -> str:
    """Return a digest of what the specs depend on: the corpus, capture and detection; not the emitter."""
    files = [*corpus.glob("*/*.py"), *corpus.glob("zoo/zoo/*.py")]
    files += [p for d in ("compiler", "passes") for p in (ROOT / d).rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def computations(found: list[Row]) -> list[Row]:
    """Return one row per different computation, those of most sites first: emitted, or a miss and its why."""
    from attnc.codegen.triton import can_run, emit
    from attnc.codegen.triton.canonical import canonical
    from attnc.printer import parse

    out: dict[str, Row] = {}
    for row in found:
        for site in row.get("sites", []):
            if not site["spec"]:
                continue
            spec = canonical(parse(site["spec"]))
            text = str(spec)
            if text not in out:
                miss = can_run(spec)
                made = {"emitted": True, "key": emit(spec).key} if miss is None else {"emitted": False}
                why = {} if miss is None else {"code": miss.code, "why": miss.why}
                out[text] = {"spec": text, **made, **why, "sites": 0, "models": []}
            out[text]["sites"] += 1
            if row["name"] not in out[text]["models"]:
                out[text]["models"].append(row["name"])
    return sorted(out.values(), key=lambda r: (-r["sites"], r["spec"]))


def without_spec(found: list[Row]) -> list[Row]:
    """Return one row per code for sites that have no spec: how many, and examples."""
    out: dict[str, Row] = {}
    for row in found:
        for site in row.get("sites", []):
            if not site["spec"]:
                entry = out.setdefault(site["code"], {"code": site["code"], "sites": 0, "examples": []})
                entry["sites"] += 1
                if len(entry["examples"]) < SHOWN:
                    entry["examples"].append(f"{row['name']}: {site['reason']}")
    return sorted(out.values(), key=lambda r: (-r["sites"], r["code"]))


def self_tests(found: list[Row], jobs: int) -> None:
    """Run each emitted file's own test in a process of its own; note what it said."""
    from attnc.codegen.triton import emit
    from attnc.printer import parse

    made = [r for r in found if r["emitted"]]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        files = [Path(folder) / f"kernel_{i}.py" for i in range(len(made))]
        for file, row in zip(files, made, strict=True):
            file.write_text(emit(parse(row["spec"]), name=file.stem).source)
        for i, (row, said) in enumerate(zip(made, pool.map(_own_test, files), strict=True), 1):
            row["self_test"] = said
            if said != "passed" or i % 25 == 0 or i == len(made):
                print(f"  self-test {i} of {len(made)}: {said}", flush=True)


def _own_test(file: Path) -> str:
    """Return "passed", or what a file's own test said last."""
    try:
        done = subprocess.run(
            [sys.executable, str(file)], capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done in {TIMEOUT} s"
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return "passed" if done.returncode == 0 and "passed" in done.stdout else lines[-1][:200]


def totals(found: list[Row], made: list[Row], unread: list[Row]) -> Row:
    """Return the sums: models, sites, computations, and misses by code."""
    missed = [r for r in made if not r["emitted"]]
    sites, different = Counter[str](), Counter[str]()
    for r in missed:
        sites[r["code"]] += r["sites"]
        different[r["code"]] += 1
    out = {
        "models": len(found),
        "models_that_raised": sum("sites" not in r for r in found),
        "sites_with_a_spec": sum(r["sites"] for r in made),
        "sites_with_a_kernel": sum(r["sites"] for r in made if r["emitted"]),
        "computations": len(made),
        "computations_with_a_kernel": sum(r["emitted"] for r in made),
        "misses": {c: {"computations": different[c], "sites": sites[c]} for c in sorted(sites)},
        "sites_without_a_spec": sum(r["sites"] for r in unread),
    }
    tested = [r["self_test"] for r in made if "self_test" in r]
    return {**out, "self_tests": {"passed": tested.count("passed"), "run": len(tested)}} if tested else out


def shorter(row: Row) -> Row:
    """Return a row whose list of models is a few examples and a number."""
    return {**row, "models": row["models"][:SHOWN], "of_models": len(row["models"])}


def show(result: Row) -> None:
    """Print the table: sums, then every computation without a kernel, then sites without a spec."""
    for key, value in result["totals"].items():
        print(f"{key.replace('_', ' '):28s} {value}")
    for r in (r for r in result["computations"] if not r["emitted"]):
        print(f"  {r['sites']:4d} sites  {r['code']}: {r['why']}  ({', '.join(r['models'])})")
    for r in (r for r in result["computations"] if r.get("self_test", "passed") != "passed"):
        print(f"  self-test: {r['self_test']}: {r['spec']}  ({', '.join(r['models'])})")
    for r in result["without_spec"]:
        print(f"  {r['sites']:4d} sites without a spec  {r['code']}: {r['examples'][0]}")
    for r in result["raised"]:
        print(f"  {r['name']}: {r['why']}")


def main() -> int:
    """Inspect, emit, test, write; return 1 if a self-test failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path, help="the folder with spellings/ and zoo/")
    parser.add_argument("--sample", type=int, default=1, help="one in this many of the zoo's models")
    parser.add_argument("--only", default="", help="regular expression on the names; writes no results")
    parser.add_argument(
        "--dtype", default="", help="bfloat16, say: cast models and inputs; writes no results"
    )
    parser.add_argument("--self-test", action="store_true", help="run each emitted file's own test")
    parser.add_argument("--jobs", type=int, default=1, help="self-tests at a time")
    parser.add_argument("--limit", type=int, default=240, help="seconds per model")
    parser.add_argument("--fresh", action="store_true", help="use no kept rows")
    a = parser.parse_args()
    a.corpus = a.corpus.resolve()
    corpus = Corpus(a.corpus)
    names = [*(f"spellings/{n}" for n in corpus.spelling_names()), *corpus.zoo_names(a.sample)]
    warm(corpus, ["attnc"])
    found = rows(corpus, names, a)
    made, unread = computations(found), without_spec(found)
    if a.self_test:
        self_tests(made, a.jobs)
    raised = [{"name": r["name"], "why": r.get("why", "")} for r in found if "sites" not in r]
    result = {
        **about("torch", "triton", "transformers"),
        "totals": totals(found, made, unread),
        "computations": [shorter(r) for r in made],
        "without_spec": unread,
        "raised": raised,
    }
    show(result)
    if not a.only and not a.dtype:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(r.get("self_test", "passed") != "passed" for r in made))


if __name__ == "__main__":
    sys.exit(main())
