"""Compile every kind of emitted kernel for GPUs that are not here, and keep what each needs in a table.

    make gate                                         # with the triton of .venv, then with triton 3.6
    python benchmarks/gate.py --only 'causal_bf16'    # prints these and writes nothing

The specs: those of ``tests/codegen/triton/corpus.txt``, and a sample of what models ask for (``SAMPLE``).
Each is emitted with its default config per GPU and compiled for sm_80, sm_90, sm_100 and gfx942; a row holds
registers, shared memory, spills and instructions by kind (``attnc.codegen.triton.aot`` says from where), and
a fingerprint of what was compiled.  A kernel whose fingerprint ``tests/codegen/triton/gate.csv`` has for the
running triton keeps its rows, unless ``--again`` asks for all; the others take their places in the table, and
the rows of other versions stay.  ``test_gate.py`` holds the table to its rules.  Prints what does not
compile, spills or is over the limit, and what became worse since the last table.
Nothing here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

from machine import about

from attnc.codegen.triton import can_run, emit
from attnc.codegen.triton.aot import TARGETS, report_rows
from attnc.codegen.triton.emit import kind_of, spec_of
from attnc.codegen.triton.kinds import KINDS
from attnc.ir import AttentionSpec, Kernel
from attnc.printer import parse

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests" / "codegen" / "triton" / "corpus.txt"
TABLE = ROOT / "tests" / "codegen" / "triton" / "gate.csv"
SUMMARY = ROOT / "benchmarks" / "results" / "gate.json"
TEXTS = ("case", "kind", "triton", "fingerprint", "program", "target", "error")
"""The columns of the table that hold no number."""
Row = dict[str, Any]

SPEC = (
    "attn q=bhqd[b,h,s,{d}]:{dtype} k=bhkd[b,hkv,t,{d}]:{dtype} v=bhke[b,hkv,t,{e}]:{dtype} group={group}"
    " scale({scale!r}) {rest}"
)
CAUSAL = "mask=causal fill(replace,-inf) softmax"
LEAST = -3.4028234663852886e38
VARIANTS = {
    "full": "mask=none softmax",
    "causal": CAUSAL,
    "grouped": CAUSAL,
    "window": "mask=window(left=1023,right=0) fill(replace,-inf) softmax",
    "padded": f"mask=(causal & padding(key,pad)) fill(replace,{LEAST}) softmax with pad=bk[b,t]:bool",
    "documents": "mask=(causal & document(own,ids)) fill(replace,-inf) softmax"
    " with own=bq[b,s]:int64 with ids=bk[b,t]:int64",
    "alibi": f"bias(alibi) {CAUSAL} with alibi=bhqk[1,h,1,t]:float32",
    "softcap": f"softcap(50.0) {CAUSAL}",
    "bias": "bias(rel) mask=none softmax with rel=bhqk[1,h,s,t]:{dtype}",
    "dropout": f"{CAUSAL} dropout(0.1)",
    "sinks": "mask=causal fill(replace,-inf) softmax(sink=logits) with logits=h[h]:{dtype}",
}
"""What models add to ``softmax(q @ k^T) @ v``; ``grouped`` has eight query heads per key head, others one."""
SAMPLE = (
    ("bfloat16", ("128",), tuple(VARIANTS)),
    ("bfloat16", ("64",), ("full", "causal", "window", "bias", "sinks", "dropout")),
    ("bfloat16", ("80",), ("full", "causal")),
    ("bfloat16", ("96",), ("causal", "window")),
    ("bfloat16", ("192x128",), ("causal", "padded")),
    ("bfloat16", ("256",), ("causal", "window", "softcap")),
    ("float16", ("64",), ("full", "causal", "bias")),
    ("float16", ("80",), ("full",)),
    ("float16", ("128", "256"), ("causal",)),
    ("float32", ("64",), ("full", "causal", "padded")),
    ("float32", ("80",), ("full",)),
    ("float32", ("128",), ("full", "causal")),
    ("float32", ("256",), ("causal",)),
)
"""Dtype, head sizes (of keys x of values, if they differ), variants."""
EVERY_KIND = (
    "causal_bf16_64",
    "causal_bf16_128",
    "grouped_bf16_128",
    "window_bf16_128",
    "documents_bf16_128",
    "padded_bf16_128",
    "bias_bf16_128",
    "dropout_bf16_64",
    "dropout_bf16_128",
    "causal_bf16_192x128",
    "causal_bf16_256",
    "causal_fp32_64",
)
"""The specs that are compiled as every kind of kernel, the others as ``forward`` alone, to save time."""
WORSE = {"registers": (8, 0.0), "shared": (0, 0.0), "stack": (0, 0.0), "spills": (0, 0.0)}
WORSE |= {"loop_spills": (0, 0.0), "loop_instructions": (0, 0.05), "instructions": (0, 0.1)}
"""What may grow by how much, absolutely and relatively, before a kernel counts as worse."""


def specs() -> dict[str, AttentionSpec]:
    """Return every spec of the gate by its name."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    pairs = (line.partition(" ") for line in lines if not line.startswith("#"))
    return {name: parse(text) for name, _, text in pairs} | dict(_sample())


def _sample() -> Iterator[tuple[str, AttentionSpec]]:
    for dtype, heads, names in SAMPLE:
        short = dtype.replace("float", "fp").replace("bfp", "bf")
        yield from ((f"{name}_{short}_{h}", variant(name, dtype, h)) for h in heads for name in names)


def variant(name: str, dtype: str, head: str) -> AttentionSpec:
    """Return one of ``VARIANTS`` for a head size such as ``64``, or ``192x128`` where that of v differs."""
    d, _, e = head.partition("x")
    rest = VARIANTS[name].replace("{dtype}", dtype)
    group, scale = 8 if name == "grouped" else 1, 1 / math.sqrt(int(d))
    return parse(SPEC.format(d=d, e=e or d, dtype=dtype, group=group, scale=scale, rest=rest))


def kernels(case: str, spec: AttentionSpec) -> dict[str, Kernel]:
    """Return the kernels that attnc emits for a spec, by kind."""
    wanted = KINDS if case in EVERY_KIND else ("forward",)
    return {kind: emit(spec, name=case, kind=kind) for kind in wanted if can_run(spec, kind) is None}


def fingerprint(source: str) -> str:
    """Return a digest of what is compiled of an emitted file: its spec, its values, its jit functions.

    And of how: the programs of its kind and the types of their arguments.  Comments, docstrings, the launcher
    and the self-test may change without a new compilation.
    """
    own, chosen = spec_of(source), KINDS[kind_of(source)]
    nodes = [n for n in ast.parse(source).body if isinstance(n, ast.Assign) or _is_jit(n)]
    how = repr((chosen.programs, chosen.more(own), chosen.types(own)))
    parts = [str(own), how, *(" ".join(_tokens(ast.get_source_segment(source, n))) for n in nodes)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_jit(node: ast.stmt) -> bool:
    marks = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any("triton.jit" in ast.unparse(mark) for mark in marks)


def _tokens(text: str | None) -> Iterator[str]:
    """Yield the tokens of a statement, without comments, line ends and docstrings."""
    before = tokenize.INDENT
    for token in tokenize.generate_tokens(io.StringIO(text or "").readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if token.type != tokenize.STRING or before != tokenize.INDENT:
            yield token.string.strip()
        before = token.type


def measure(case: str, spec: AttentionSpec, kept: Iterable[str] = ()) -> list[Row]:
    """Compile a spec's kernels for every target, but for those whose fingerprints are ``kept``.

    The user's kernels and triton's cache are not touched.
    """
    import triton

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        places = {"XDG_CACHE_HOME": folder, "TRITON_CACHE_DIR": folder}
        with mock.patch.dict(os.environ, places):
            for kind, kernel in kernels(case, spec).items():
                known = {"case": case, "kind": kind, "triton": triton.__version__}
                known |= {"fingerprint": fingerprint(kernel.source)}
                if known["fingerprint"] not in kept:
                    rows += [known | row for row in report_rows(kernel)]
    for row in rows:  # a compiler's words may name files of this machine
        row["error"] = row["error"] and re.sub(r"/\S*/", "", row["error"])
    return rows


def measure_all(
    todo: dict[str, AttentionSpec], kept: list[Row], jobs: int
) -> Iterator[tuple[str, list[Row]]]:
    """Yield every spec's name and rows, kept or from ``jobs`` processes, in order."""
    prints = [{r["fingerprint"] for r in kept if r["case"] == case} for case in todo]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for case, rows in zip(todo, pool.map(measure, todo, todo.values(), prints), strict=True):
            now = {fingerprint(kernel.source) for kernel in kernels(case, todo[case]).values()}
            yield case, [r for r in kept if r["case"] == case and r["fingerprint"] in now] + rows


def read(table: Path = TABLE) -> list[Row]:
    """Return the rows of the committed table; numbers are integers, an empty cell is None."""
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        return [{k: _value(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def _value(column: str, text: str) -> int | str | None:
    return text or None if column in TEXTS else int(text) if text else None


def write(rows: Iterable[Row], table: Path = TABLE) -> None:
    """Write the rows in an order that does not depend on how they came."""
    ordered = sorted(rows, key=lambda r: (r["case"], r["kind"], r["program"], *_place(r)))
    columns = list(dict.fromkeys(c for r in ordered for c in r if c not in ("kernel", "over_limit")))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(ordered)


def _place(row: Row) -> tuple[int, tuple[int, ...]]:
    return TARGETS.index(row["target"]), tuple(map(int, re.findall(r"\d+", row["triton"])))


def identity(row: Row) -> tuple[str, ...]:
    """Return what tells a row from all others of the table."""
    return tuple(row[c] for c in ("case", "kind", "program", "target", "triton"))


def faults(row: Row) -> str | None:
    """Return why a kernel may not run well, or None: it does not compile, spills or is over the limit."""
    if row["error"]:
        return f"does not compile: {row['error']}"
    if row["shared"] > row["shared_limit"]:
        return f"needs {row['shared']} bytes of shared memory of {row['shared_limit']}"
    if row["stack"] or row["spills"]:
        inside = f", {row['loop_spills']} of them in a loop over keys" if row["loop_spills"] else ""
        return f"has {row['stack']} bytes of stack, {row['spills']} local loads and stores{inside}"
    return None


def worse(old: Row, new: Row) -> str | None:
    """Return what of a kernel grew by more than ``WORSE`` allows, or None."""
    if new["error"] or old["error"]:
        return new["error"] if not old["error"] else None
    grew = [
        f"{name} {old[name]} -> {new[name]}"
        for name, (absolute, relative) in WORSE.items()
        if (new[name] or 0) > (old[name] or 0) * (1 + relative) + absolute
    ]
    return ", ".join(grew) or None


def main() -> None:
    """Compile, print what is at fault and what became worse, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="specs whose name this pattern finds; nothing is written")
    parser.add_argument("--again", action="store_true", help="compile what the table has, too")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    result = about("torch", "triton")
    before = {identity(r): r for r in read()}
    todo = {n: s for n, s in specs().items() if not a.only or re.search(a.only, n)}
    version = result["versions"]["triton"]
    kept = [] if a.again else [r for r in before.values() if r["triton"] == version]
    start, found = time.monotonic(), {}
    try:
        for case, rows in measure_all(todo, kept, a.jobs):
            found[case] = rows
            for row in rows:
                _print(row, before.get(identity(row)))
    finally:
        if not a.only:  # where it is interrupted, the next run goes on from here
            left = todo.keys() - found.keys()
            old = (r for r in before.values() if r["triton"] != version or r["case"] in left)
            write([*itertools.chain(*found.values()), *old])
    rows = [*itertools.chain(*found.values())]
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    result |= {
        "seconds": round(time.monotonic() - start),
        "processor_seconds": round(spent.ru_utime + spent.ru_stime),
    }
    result |= {
        "specs": len(todo),
        "rows": len(rows),
        "compiled": sum(r not in kept for r in rows),
        "at_fault": sum(faults(r) is not None for r in rows),
    }
    print(json.dumps(result))
    if a.only or not result["compiled"]:
        return
    kept = json.loads(SUMMARY.read_text()) if SUMMARY.is_file() else {}
    SUMMARY.write_text(json.dumps(dict(sorted((kept | {version: result}).items())), indent=1) + "\n")


def _print(row: Row, old: Row | None) -> None:
    grew = worse(old, row) if old else None
    for text in (faults(row), grew and f"worse than in the table: {grew}"):
        if text:
            print(f"{' '.join(identity(row)[:-1])}: {text}", flush=True)


if __name__ == "__main__":
    main()
