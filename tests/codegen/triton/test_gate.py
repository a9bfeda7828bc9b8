"""The committed table of what compiled kernels need: that it is of today's kernels, and what it may hold."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from attnc.codegen.triton.aot import programs

ROOT = Path(__file__).parents[3]
OLDEST = "3.6.0"
BEST = {"sm_80": "hmma", "sm_90": "hgmma", "sm_100": "utcmma", "gfx942": "mfma"}
"""The instruction by which a GPU multiplies tiles of halves fastest."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """Kernels at fault that we know of: those whose ``case kind program target triton`` a pattern finds.

    They may have so many bytes of stack per thread, and so many local loads and stores, of which ``in_loops``
    in a loop over keys; or the compiler may refuse them with the words ``error``.
    """

    where: str
    reason: str
    stack: int = 0
    spills: int = 0
    in_loops: int = 0
    error: str | None = None

    def allows(self, row: Row) -> bool:
        if not re.search(self.where, name(row)):
            return False
        if row["error"]:
            return self.error is not None and self.error in row["error"]
        limits = (self.stack, self.spills, self.in_loops)
        found = (row["stack"], row["spills"], row["loop_spills"] or 0)
        return all(x <= limit for x, limit in zip(found, limits, strict=True))


EXCEPTIONS = (
    Known(
        r" sm_\d+ 3\.9\.",
        "kept on the stack around the loops over keys: stored and loaded once per tile",
        stack=72,
        spills=30,
    ),
    Known(
        r" sm_\d+ 3\.6\.0$",
        "likewise; the older compiler finds fewer registers, where a tile may start again above all",
        stack=216,
        spills=130,
    ),
    Known(
        r"^full_bf16_128 forward kernel sm_80 ",
        "tiles of 128 x 32, which do not spill, need a third more instructions per pair",
        stack=24,
        spills=14,
        in_loops=5,
    ),
    Known(
        r" tangent kernel sm_(80|100) ",
        "up to four values of a loop: two outputs are carried, and four tensors loaded in a turn",
        stack=40,
        spills=22,
        in_loops=4,
    ),
)


@pytest.fixture(scope="module")
def gate() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import gate

        yield gate


@pytest.fixture(scope="module")
def table(gate: ModuleType) -> list[Row]:
    rows: list[Row] = gate.read()
    return rows


def name(row: Row) -> str:
    return " ".join(row[c] for c in ("case", "kind", "program", "target", "triton"))


def test_the_table_is_of_the_kernels_as_they_are_emitted_now(
    gate: ModuleType, table: list[Row], tmp_path: Path
) -> None:
    versions = {row["triton"] for row in table}
    assert OLDEST in versions, f"{OLDEST} is missing: run make gate"
    assert len(versions) == 2, f"expected {OLDEST} and one newer, found {versions}: run make gate"
    found = {(r["case"], r["kind"], r["triton"], r["target"], r["fingerprint"]) for r in table}
    now = set()
    for case, spec in gate.specs().items():
        for kind, kernel in gate.kernels(case, spec).items():
            mark, targets = gate.fingerprint(kernel.source), {target for target, _ in programs(kernel)}
            now |= {(case, kind, version, target, mark) for version in versions for target in targets}
    stale = sorted({" ".join(row[:3]) for row in found ^ now})
    assert not stale, f"{len(stale)} entries are of other kernels, such as {stale[:3]}: run make gate"
    assert len({gate.identity(row) for row in table}) == len(table)
    gate.write(reversed(table), tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == gate.TABLE.read_bytes(), "edited by hand: run make gate"


def test_every_kernel_is_within_its_shared_memory(table: list[Row]) -> None:
    bad = [name(r) for r in table if not r["error"] and r["shared"] > r["shared_limit"]]
    assert not bad, bad


def test_kernels_compile_and_do_not_spill_but_for_the_known_ones(gate: ModuleType, table: list[Row]) -> None:
    at_fault = [row for row in table if gate.faults(row)]
    bad = [f"{name(r)}: {gate.faults(r)}" for r in at_fault if not any(k.allows(r) for k in EXCEPTIONS)]
    assert not bad, "\n".join(bad)
    idle = [k.where for k in EXCEPTIONS if not any(k.allows(r) for r in at_fault)]
    assert not idle, f"exceptions that no kernel needs any more: {idle}"


def test_halves_are_multiplied_by_tensor_cores(gate: ModuleType, table: list[Row]) -> None:
    specs = gate.specs()
    half = [r for r in table if specs[r["case"]].q.dtype != torch.float32 and not r["error"]]
    bad = [name(r) for r in half if r["kind"] == "forward" and not r[BEST[r["target"]]]]
    assert not bad, bad
    multiply = [r for r in half if r["program"].split()[0] not in ("combine", "rows_kernel")]
    assert not [name(r) for r in multiply if not any(r[m] for m in BEST.values())]


@pytest.mark.slow
def test_a_sample_compiles_as_the_table_says(gate: ModuleType, table: list[Row]) -> None:
    import triton

    by_case: dict[str, dict[tuple[str, ...], Row]] = defaultdict(dict)
    for row in table:
        if row["triton"] == triton.__version__:
            by_case[row["case"]][gate.identity(row)] = row
    if not by_case:
        pytest.skip(f"the table has no rows of triton {triton.__version__}")
    for case in sorted(by_case)[::8]:
        for row in gate.measure(case, gate.specs()[case]):
            grew = gate.worse(by_case[case][gate.identity(row)], row)
            assert grew is None, f"{name(row)}: {grew}"
