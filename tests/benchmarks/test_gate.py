"""The tool behind `make gate`; what its table may hold is tested in tests/codegen/triton."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from attnc.codegen.triton.kinds import KINDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gate() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import gate

        yield gate


def test_every_spec_has_a_kernel_and_some_have_every_kind(gate: ModuleType) -> None:
    specs = gate.specs()
    assert set(gate.EVERY_KIND) <= specs.keys()
    assert not [case for case, spec in specs.items() if "forward" not in gate.kernels(case, spec)]
    assert {kind for case in gate.EVERY_KIND for kind in gate.kernels(case, specs[case])} == KINDS.keys()


def test_a_fingerprint_is_of_what_is_compiled(gate: ModuleType) -> None:
    source = gate.kernels("causal", gate.specs()["causal"])["forward"].source
    same = source.replace("One program: ", "A program: ").replace("for key, value", "for value, key")
    same = same.replace("  # ", "  # that is: ").replace("def launch(", "def start(")
    assert same != source
    assert gate.fingerprint(same) == gate.fingerprint(source)
    for old, new in (("ki <= qi", "ki < qi"), ('"sm_90": (', '"sm_90": (2, '), ("mask=causal", "mask=none")):
        assert old in source
        assert gate.fingerprint(source.replace(old, new)) != gate.fingerprint(source)
    backward = source.replace("kind    forward", "kind    backward")
    assert gate.fingerprint(backward) != gate.fingerprint(source)


def test_a_kernel_is_worse_beyond_the_margins_only(gate: ModuleType) -> None:
    old = {"registers": 100, "shared": 64, "stack": 0, "spills": 0, "instructions": 1000, "error": None}
    old |= {"loop_spills": None, "loop_instructions": 400}
    assert gate.worse(old, old | {"registers": 108, "instructions": 1100, "loop_instructions": 420}) is None
    assert gate.worse(old, old | {"registers": 109}) == "registers 100 -> 109"
    both = "spills 0 -> 1, loop_instructions 400 -> 421"
    assert gate.worse(old, old | {"spills": 1, "loop_instructions": 421}) == both
    assert gate.worse(old, old | {"error": "no"}) == "no"
    assert gate.worse(old | {"error": "no"}, old) is None


def test_a_table_reads_back_as_it_was_written_in_one_order(gate: ModuleType, tmp_path: Path) -> None:
    row = {"case": "b", "kind": "forward", "triton": "3.10.0", "fingerprint": "0123456789012345"}
    row |= {"program": "kernel", "target": "sm_90", "registers": 168, "loop_spills": None, "error": None}
    rows = [row, row | {"triton": "3.6.0"}, row | {"target": "sm_80"}, row | {"case": "a", "error": "no"}]
    table = tmp_path / "gate.csv"
    gate.write([r | {"kernel": "b", "over_limit": False} for r in rows], table)
    assert gate.read(table) == [rows[3], rows[2], rows[1], rows[0]]
    assert gate.read(tmp_path / "none.csv") == []
