"""Call every model of the zoo at three sizes after one capture, and compare with the original at each.

    python benchmarks/dynamic_zoo.py ZOO [--only REGEX] [--limit SECONDS]

ZOO is the folder of the corpus (the one that holds ``run.py``).  A model is optimized once on its example
inputs, with every size free that ``torch.export`` can leave free (``Dim.AUTO``).  Then it is called on its
example, at another batch, and at another length, as far as the original itself runs on those inputs: other
sizes are made from the example by repeating or cutting each axis that has the batch's or the sequence's
length.  Each output must agree with the original's to 1e-4 of its largest value.

One line per model: sizes that stayed free, programs captured, and per size ``ok``, ``-`` (the original does
not run there) or the error.  "one capture" counts models whose every call that runs was served by the first
program.  A second program, or a call of the original forward, is never hidden: ``+capture`` marks it where
a size changed that torch.export had to fix or bound (a program of chunks of 16 may take multiples of 16
alone), ``+capture!`` where the first program takes the changed sizes.
Exit code 1 if a model raises, disagrees, or is captured again although the first program takes the sizes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from dynamo_zoo import call_of, floats
from torch import nn
from torch.utils import _pytree as pytree

import attnc
from attnc.api import session

AGREE = 1e-4
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def resized(call: Inputs, changes: Mapping[int, int]) -> Inputs:
    """Return inputs in which every axis whose length is a key of ``changes`` has the new length.

    Longer axes repeat the example from its start, so that token ids, masks and features stay what they are.
    The batch is the first axis and is only changed there (its key is negative); lengths are only changed
    behind it, and never on the last axis of floats, which holds features.
    """

    def one(t: torch.Tensor) -> torch.Tensor:
        for axis, n in enumerate(t.shape):
            features = t.is_floating_point() and axis == t.ndim - 1 and axis > 1
            wanted = None if features else changes.get(-n if axis == 0 else n)
            if wanted is not None:
                t = t.index_select(axis, torch.arange(wanted) % n)
        return t.contiguous()

    changed: Inputs = pytree.tree_map_only(torch.Tensor, one, call)
    return changed


def sizes_of(call: Inputs) -> tuple[int, int | None]:
    """Return the batch, and the length of the second axis of token ids or masks, else of any input."""
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor) and t.ndim]
    whole = [t for t in tensors if not t.is_floating_point() and t.ndim == 2]
    whole = whole or [t for t in tensors if t.ndim >= 2]
    return tensors[0].shape[0], (whole[0].shape[1] if whole else None)


def three_sizes(call: Inputs) -> dict[str, Inputs]:
    """Return the example and the same inputs at another batch and at another length, by name."""
    batch, length = sizes_of(call)
    out = {"example": call, "batch": resized(call, {-batch: batch + 1})}
    if length is not None and length > 2:
        out["length"] = resized(call, {length: length // 2 + 3})
    return out


def outputs(model: nn.Module, call: Inputs) -> list[torch.Tensor]:
    """Run without gradients and with the same random numbers each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return floats(model(*call[0], **call[1]))


def apart(want: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Return the largest difference relative to the largest value; infinite if shapes or NaNs differ."""
    if [t.shape for t in want] != [t.shape for t in got]:
        return float("inf")
    worst = 0.0
    for x, y in zip(want, got, strict=True):
        if x.numel():
            same = torch.equal(x.isfinite(), y.isfinite())
            scale = x.nan_to_num(0, 0, 0).abs().max().clamp_min(1e-6)
            worst = max(
                worst, float((x - y).nan_to_num(0, 0, 0).abs().max() / scale) if same else float("inf")
            )
    return worst


def free_sizes(fast: nn.Module) -> list[str]:
    """Return the sizes of inputs that the first program leaves free, as ``input_ids[0]``."""
    programs = session(fast).outcomes
    if not programs or programs[0].runtime is None:
        return []
    program = programs[0].runtime
    users = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    out = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in users and isinstance(value, torch.Tensor):
            out += [f"{node.name}[{i}]" for i, n in enumerate(value.shape) if not str(n).isdigit()]
    return out


def changed(fast: nn.Module, example: Inputs, given: Inputs) -> list[str]:
    """Return the sizes of inputs that ``given`` changes, in the words of ``free_sizes``."""
    programs = session(fast).outcomes
    if not programs or programs[0].runtime is None:
        return []
    signature = programs[0].runtime.graph_signature
    users = [s.arg.name for s in signature.input_specs if s.kind.name == "USER_INPUT"]
    leaves = [[t for t in pytree.tree_leaves(c)] for c in (example, given)]
    return [
        f"{name}[{i}]"
        for name, a, b in zip(users, *leaves, strict=False)
        if isinstance(a, torch.Tensor)
        for i, (n, m) in enumerate(zip(a.shape, b.shape, strict=True))
        if n != m
    ]


def takes(fast: nn.Module, given: Inputs) -> bool:
    """Say whether the first captured program accepts the sizes by its own guards."""
    programs = session(fast).outcomes
    if not programs or programs[0].runtime is None:
        return False
    try:
        outputs(programs[0].runtime.module(), given)
    except Exception:  # a guard that does not hold, in whatever words
        return False
    return True


def check(load: Any, name: str) -> dict[str, Any]:
    """Check one model; return its record."""
    try:
        model, inputs, _ = load(name)
    except Exception as error:  # what the corpus cannot build here says nothing about us
        return {"name": name, "not_built": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    model, call = model.eval(), call_of(inputs)
    calls: dict[str, tuple[Inputs, list[torch.Tensor]]] = {}
    for size, given in three_sizes(call).items():
        try:
            calls[size] = given, outputs(copy.deepcopy(model), given)  # some change themselves when called
        except Exception as error:  # not every model runs at every size, and its own refusal is no fault
            if size == "example":
                raise
            print(f"{name} at another {size}: {type(error).__name__}", file=sys.stderr)
    fast = attnc.optimize(model, *call, cost_model=False)
    state = session(fast)
    how = sorted({c["how"] for c in fast.report.coverage})
    record: dict[str, Any] = {"name": name, "free": free_sizes(fast), "how": how, "sizes": {}}
    for size, (given, want) in calls.items():
        before = len(state.outcomes), len(fast.report.warnings)
        error = apart(want, outputs(fast, given))
        again = len(state.outcomes) > before[0] or len(fast.report.warnings) > before[1]
        free = set(changed(fast, call, given)) <= set(record["free"])
        needless = again and free and takes(fast, given)
        record["sizes"][size] = {"error": error, "again": again, "needless": needless}
    record["programs"] = len(state.outcomes)
    record["sites"] = fast.report.counts()
    record["notes"] = [w for w in fast.report.warnings if "internal-error" in w or "sizes are fixed" in w]
    return record


def judged(record: dict[str, Any]) -> tuple[str, bool]:
    """Return a record's line, and whether it holds."""
    if "not_built" in record:
        return f"not built: {record['not_built']}", True
    if "error" in record:
        return f"raised {record['error']}", False
    cells, ok, free = [], True, " ".join(record["free"]) or "none"
    for size in ("example", "batch", "length"):
        found = record["sizes"].get(size)
        agrees = found is not None and found["error"] <= AGREE
        needless = found is not None and found["needless"]
        ok = ok and (found is None or agrees) and not needless
        cells.append("-" if found is None else "ok" if agrees else f"{found['error']:.1e}")
        cells[-1] += "" if found is None or not found["again"] else "+capture!" if needless else "+capture"
    programs = record["programs"] if "whole" in record["how"] else "/".join(record["how"]) or "original"
    notes = "".join(f"\n    {n}" for n in record["notes"])
    columns = f"{cells[0]:>8} {cells[1]:>12} {cells[2]:>12}"
    return f"{record['sites']['rewritten']:>5}{programs!s:>9}  {columns}  {free[:60]}{notes}", ok


def in_child(load: Any, name: str, limit: int) -> dict[str, Any]:
    """Check one model in a process of its own, so that one that hangs or crashes costs no other."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(limit)
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            record = check(load, name)
        except BaseException as error:
            said = " ".join(str(error).split())[:200]
            record = {"name": name, "error": f"{type(error).__name__}: {said}"}
        os.write(write, json.dumps(record).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    found: dict[str, Any] = (
        json.loads(text) if text else {"name": name, "error": f"no answer within {limit} s"}
    )
    return found


def records(load: Any, names: list[str], limit: int) -> Iterator[dict[str, Any]]:
    """Check each model in turn."""
    for name in names:
        yield in_child(load, name, limit)


def main() -> int:
    """Print one line per model and the totals; return 1 if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", help="the folder that holds the corpus' run.py")
    parser.add_argument("--only", default="", help="regular expression on the model's name")
    parser.add_argument("--every", type=int, default=1, help="check one in this many of the names")
    parser.add_argument("--limit", type=int, default=120, help="seconds per model")
    given = parser.parse_args()
    sys.path.insert(0, given.zoo)
    from zoo.__main__ import all_jobs, load, split_of, warm

    warnings.filterwarnings("ignore")
    warm(None)
    jobs = [j for j in all_jobs() if split_of(j) == "open" and "@" not in j and re.search(given.only, j)]
    columns = f"{'example':>8} {'batch':>12} {'length':>12}"
    print(f"{'model':<40}{'sites':>5}{'programs':>9}  {columns}  free sizes", flush=True)
    all_, failed, one = [], [], 0
    for record in records(load, jobs[:: given.every], given.limit):
        line, ok = judged(record)
        print(f"{record['name']:<40}{line}", flush=True)
        all_.append(record)
        failed += [] if ok else [record["name"]]
        again = [s["again"] for s in record.get("sizes", {}).values()]
        one += "sizes" in record and record["programs"] == 1 and not any(again)
    built = [r for r in all_ if "not_built" not in r]
    moved = [r for r in built if len(r.get("sizes", {})) > 1]
    print(
        f"{len(built)} models, {len(moved)} run at other sizes; one capture for all: {one}; "
        f"fail: {len(failed)} {' '.join(failed)}"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
