"""How much attention attnc recognises, against three other tools, on one corpus.

    python benchmarks/recognition.py --tools attnc
    python benchmarks/recognition.py --tools inductor,ort_fusions,ort_optimizer --sample 3
    python benchmarks/recognition.py --tools attnc --zoo --only 'hf/(bert|llama)'

The tools: attnc; Inductor's pattern matcher; onnxscript's ort_fusions; ONNX Runtime's transformers optimizer,
at the best of its model types.  The corpus lies beside this repository (``--corpus``): 34 spellings of
attention, and tiny versions of public models, each with the number of sites that a tracker counted.

Every model runs in a process of its own, with a time limit.  Rows are kept in ``build/recognition`` as they
come, so a run that was broken off goes on where it stopped; a row is used again only while corpus, adapters
and, for attnc, its sources are the same, and not if the time was up.  The results of the tools that ran take
their places in ``benchmarks/results/recognition.json``, in the table ``recognition.md`` and in the README;
those of other tools stay.  With ``--only`` nothing but the kept rows is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import scoreboard
from corpus import ROOT, TOOLS, Corpus, Tool, run_model, run_spelling
from isolated import isolated
from machine import about

RESULTS = ROOT / "benchmarks" / "results"
KEPT = ROOT / "build" / "recognition"
Row = dict[str, Any]


def rows_of(
    name: str, jobs: Sequence[str], stamp: str, work: Callable[[str], Row], limit: int, fresh: bool
) -> list[Row]:
    """Return one row per job, kept ones first, the others made in processes of their own."""
    file = KEPT / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() and not fresh else []
    known = {r["name"]: r for r in kept if r["stamp"] == stamp and not _ran_out(r)}
    todo = [j for j in jobs if j not in known]
    print(f"{name}: {len(jobs)} runs, {len(jobs) - len(todo)} kept", flush=True)
    start = time.monotonic()
    with file.open("a" if known else "w") as sink:
        for i, job in enumerate(todo, 1):
            row = {"name": job, **isolated(partial(work, job), limit)}
            known[job] = {**row, "stamp": stamp}
            sink.write(json.dumps(known[job]) + "\n")
            sink.flush()
            if i % 25 == 0 or i == len(todo):
                print(f"  {i} of {len(todo)} in {time.monotonic() - start:.0f} s", flush=True)
    return [{k: v for k, v in known[j].items() if k != "stamp"} for j in jobs]


def _ran_out(row: Row) -> bool:
    """Say whether a row says no more than that the time was up, which another run may not say."""
    return "time limit" in f"{row.get('why', '')} {row.get('raised', '')}"


def run_tool(corpus: Corpus, tool: Tool, parts: Sequence[str], a: argparse.Namespace) -> Row:
    """Run one tool over the parts of the corpus asked for; return its entry of the results."""
    entry: Row = {"title": tool.title, "reports_masks": tool.reports_masks}
    stamp = corpus.fingerprint(tool)
    for part in parts:
        names = corpus.spelling_names() if part == "spellings" else corpus.zoo_names(a.sample)
        jobs = [n for n in names if re.search(a.only, n)]
        work = (
            partial(run_spelling, corpus, tool)
            if part == "spellings"
            else partial(run_model, corpus, tool, limit=a.limit)
        )
        rows = rows_of(f"{part}_{tool.name}", jobs, stamp, work, a.limit, a.fresh)
        if part == "spellings":
            rows = [{"kind": corpus.kind(r["name"]), **r} for r in rows]
        rows = [r for r in rows if r.get("status") != "skip"]
        totals = scoreboard.sum_spellings(rows) if part == "spellings" else scoreboard.sum_models(rows)
        sample = {"sample": a.sample} if part == "zoo" else {}
        entry[part] = {**about(*tool.packages), **sample, "runs": len(rows), "totals": totals, "rows": rows}
        print(f"  {tool.title}, {part}: {totals}", flush=True)
    return entry


def merge(results: Row, name: str, entry: Row) -> Row:
    """Return the results with a tool's new parts in place of its old ones, in the table's order."""
    tools = {**results.get("tools", {}), name: {**results.get("tools", {}).get(name, {}), **entry}}
    return {"tools": {t.name: tools[t.name] for t in TOOLS if t.name in tools}}


def warm(corpus: Corpus, names: Sequence[str]) -> None:
    """Import what the children need, once."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    corpus.spellings()
    if "attnc" in names:
        import attnc  # noqa: F401
    corpus.zoo().warm("")


def main() -> int:
    """Run, write, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [t.name for t in TOOLS]
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared", help="default: ../shared")
    parser.add_argument("--spellings", action="store_true", help="only the spellings, unless --zoo as well")
    parser.add_argument("--zoo", action="store_true", help="only the zoo, unless --spellings as well")
    parser.add_argument("--tools", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--sample", type=int, default=1, help="one in this many of the zoo's models")
    parser.add_argument("--only", default="", help="regular expression on the names; writes no results")
    parser.add_argument("--limit", type=int, default=240, help="seconds per model")
    parser.add_argument("--fresh", action="store_true", help="use no kept rows")
    a = parser.parse_args()
    wanted = a.tools.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        sys.exit(f"recognition: expected --tools among {', '.join(names)}, found {', '.join(unknown)}")
    corpus = Corpus(a.corpus.resolve())
    parts = [p for p in ("spellings", "zoo") if getattr(a, p)] or ["spellings", "zoo"]
    warm(corpus, wanted)
    for tool in TOOLS:
        if tool.name in wanted:
            entry = run_tool(corpus, tool, parts, a)
            results = merge(_written(), tool.name, entry)  # read now, since another run may have written it
            if not a.only:
                (RESULTS / "recognition.json").write_text(json.dumps(results, indent=1) + "\n")
                scoreboard.write(results, RESULTS / "recognition.md", ROOT / "README.md")
    print(scoreboard.table(results if a.only else _written()))
    return 0


def _written() -> Row:
    file = RESULTS / "recognition.json"
    found: Row = json.loads(file.read_text()) if file.is_file() else {}
    return found


if __name__ == "__main__":
    sys.exit(main())
