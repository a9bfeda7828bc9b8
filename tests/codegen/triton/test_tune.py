from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnc.codegen.triton import Lengths, contest, emit, picks, store, tune
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.configs import SHARED_LIMIT, Config, choose, shared_bytes
from attnc.codegen.triton.contest import disagreement, draw, limits
from attnc.codegen.triton.launch import launcher
from attnc.codegen.triton.picks import Place, place_of
from attnc.codegen.triton.tune import candidates, event_clock, problem, tuned
from attnc.errors import CodegenError, UnsupportedError
from attnc.printer import parse

HALF = (
    "attn q=bhqd[b,h,s,{d}]:bfloat16 k=bhkd[b,hkv,t,{d}]:bfloat16 v=bhke[b,hkv,t,{d}]:bfloat16 group=1"
    " mask=none softmax"
)
SIZES = Lengths(batch=1, kv_heads=1, sq=100, sk=128)


def place(arch: str, sq: int = 4096, sk: int = 4096) -> Place:
    return Place(arch, "a GPU", sq, sk)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_what_cannot_run_or_win_is_left_out(arch: str, d: int) -> None:
    spec = canonical(parse(HALF.format(d=d)))
    default = choose(spec)[arch]
    found = list(candidates(spec, place(arch), default))
    assert found
    assert default not in found
    assert len(set(found)) == len(found)
    for c in found:
        assert shared_bytes(spec, arch, c) <= SHARED_LIMIT[arch]
        assert c.warps == 4 or c.block_m * c.block_n >= 128 * 128
        assert c.block_m in (64, 128)


def test_the_reason_is_named() -> None:
    spec = canonical(parse(HALF.format(d=128)))
    reasons = {
        Config(128, 128, 8, 4): "shared memory, over the limit of 232448",
        Config(128, 64, 8, 3): "eight warps have too little to do",
        Config(128, 128, 4, 2): "256 registers per thread",
    }
    for config, words in reasons.items():
        assert words in problem(spec, place("sm_90"), config)
    assert problem(spec, place("sm_90"), Config(128, 128, 8, 2)) is None
    assert "longer than 64 queries" in problem(spec, place("sm_90", sq=64), Config(128, 64, 4, 2))
    assert "or 32 keys" in problem(spec, place("sm_90", sk=32), Config(64, 64, 4, 2))


def test_short_lengths_get_short_tiles() -> None:
    spec = canonical(parse(HALF.format(d=64)))
    few = {c.block_m for c in candidates(spec, place("sm_90", sq=32), Config(128, 64, 8, 3))}
    one = {c.block_m for c in candidates(spec, place("sm_90", sq=1), Config(128, 64, 8, 3))}
    assert (few, one) == ({16, 32}, {16})


def test_those_like_the_default_come_first() -> None:
    spec = canonical(parse(HALF.format(d=64)))
    default = Config(64, 64, 4, 2)
    assert {(c.block_m, c.block_n, c.warps) for c in list(candidates(spec, place("sm_90"), default))[:3]} >= {
        (64, 64, 4)
    }


class Bench:
    """Stands in for the GPU: emitted files run as their own reference, in milliseconds that a table gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now: Config | None = None
        self.ms: dict[Config, float] = {}
        self.faults: dict[Config, Exception | float] = {}
        self.ran: list[Config] = []
        monkeypatch.setattr(contest, "load", self.load)

    def load(self, kernel, folder: Path):
        assert not folder.is_relative_to(store.folder())  # candidates do not fill the cache
        module = store.load(kernel, folder)
        config = Config(*module.CONFIGS["interpreter"])

        def attend(*tensors):
            self.now = config
            fault = self.faults.get(config, 0.0)
            if isinstance(fault, Exception):
                raise fault
            out, lse = module.reference(*tensors, work=torch.float32)
            return (out + fault).to(tensors[0].dtype), lse

        module.attend = attend
        self.ran.append(config)
        return module

    def clock(self, call) -> float:
        call()
        return self.ms.get(self.now, 2.0)


@pytest.fixture
def bench(monkeypatch) -> Bench:
    return Bench(monkeypatch)


DEFAULT = Config(32, 32, 1, 1)
FAST, FASTER = Config(64, 32, 4, 1), Config(64, 64, 4, 1)


def test_the_fastest_wins_is_kept_and_used_where_it_was_measured(bench, corpus) -> None:
    spec = corpus["left_padded"]
    bench.ms = {FAST: 1.5, FASTER: 1.0}
    found = tune(spec, SIZES, clock=bench.clock)
    assert (found.pick, found.default, found.speedup) == (FASTER, DEFAULT, 2.0)
    assert found.trials[0].config == DEFAULT == bench.ran[0]
    here = Place("interpreter", "cpu", 128, 128)
    assert found.place == here
    assert picks.find(spec, "forward", here) == FASTER
    used = launcher(spec, here).__globals__["CONFIGS"]
    assert used["interpreter"] == (64, 64, 4, 1)
    assert used["sm_90"] == launcher(spec).__globals__["CONFIGS"]["sm_90"]
    assert launcher(spec, Place("interpreter", "cpu", 256, 128)) is launcher(spec)
    q, k, _, _ = draw(canonical(spec), Lengths(1, 1, 65, 65), "cpu")
    assert place_of(q, k) == here


def test_a_kernel_is_emitted_again_with_the_pick_in_its_table(bench, corpus) -> None:
    bench.ms = {FASTER: 1.0}
    kernel = tuned(emit(corpus["capped_half"], name="site_3"), 70, clock=bench.clock)
    assert kernel == emit(corpus["capped_half"], name="site_3", configs={"interpreter": FASTER})


def test_a_gain_that_could_be_noise_is_none(bench, corpus) -> None:
    bench.ms = {FAST: 1.99, FASTER: 1.97}
    assert tune(corpus["plain"], SIZES, clock=bench.clock).pick == DEFAULT


def test_what_the_compiler_or_the_gpu_refuses_is_not_usable_and_no_failure(bench, corpus) -> None:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    refused = {
        FAST: OutOfResources(300000, 232448, "shared memory"),
        FASTER: PTXASError("register allocation failed"),
        Config(64, 128, 4, 1): CompilationError(None, None, "unsupported tile"),
        Config(64, 32, 4, 2): RuntimeError("PassManager::run failed"),
    }
    bench.faults, bench.ms = dict(refused), dict.fromkeys(refused, 0.1)
    bench.ms[Config(64, 64, 4, 2)] = 1.0
    found = tune(corpus["plain"], SIZES, clock=bench.clock)
    assert found.pick == Config(64, 64, 4, 2)
    why = {t.config: t.why for t in found.trials if t.ms is None}
    assert set(why) == set(refused)
    assert "OutOfResources: out of resource: shared memory" in why[FAST]
    assert "register allocation failed" in why[FASTER]


def test_any_other_error_is_an_error(bench, corpus) -> None:
    bench.faults[FAST] = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune(corpus["plain"], SIZES, clock=bench.clock)
    assert list(picks.folder().glob("*")) == []


def test_kernels_that_take_more_than_the_tensors_of_a_spec_are_refused(bench, corpus, monkeypatch) -> None:
    load = bench.load

    def with_lists(kernel, folder):
        module = load(kernel, folder)
        module.attend = lambda q, k, v, counts, blocks: None
        return module

    monkeypatch.setattr(contest, "load", with_lists)
    with pytest.raises(UnsupportedError, match="runs on the tensors of a spec alone, found forward"):
        tune(corpus["plain"], SIZES, clock=bench.clock)


def test_default_tiles_that_cannot_run_leave_nothing_to_compare_with(bench, corpus) -> None:
    from triton.runtime.errors import OutOfResources

    bench.faults[DEFAULT] = OutOfResources(300000, 232448, "shared memory")
    with pytest.raises(
        CodegenError, match=r"expected the default tiles .* to run here, found OutOfResources"
    ):
        tune(corpus["plain"], SIZES, clock=bench.clock)


@pytest.mark.parametrize("fault", [0.02, float("nan"), float("inf")])
def test_other_outputs_never_win(fault: float, bench, corpus) -> None:
    bench.faults, bench.ms = {FASTER: fault}, {FAST: 1.5, FASTER: 0.1}
    found = tune(corpus["plain"], SIZES, clock=bench.clock)
    assert found.pick == FAST
    (wrong,) = [t for t in found.trials if t.ms is None]
    assert wrong.config == FASTER
    assert "output 0 is off by" in wrong.why


def test_no_more_than_the_budget_is_spent_and_the_default_is_always_measured(bench, corpus) -> None:
    found = tune(corpus["plain"], SIZES, budget=0.0, clock=bench.clock)
    assert [t.config for t in found.trials] == [DEFAULT]
    assert found.pick == DEFAULT


def test_tensors_of_the_caller_are_used_as_they_are(bench, corpus) -> None:
    spec = canonical(corpus["biases"])
    tensors = draw(spec, Lengths(2, 2, 40, 50), "cpu")
    seen = []
    run = bench.clock
    found = tune(corpus["biases"], tensors, clock=lambda call: seen.append(1) or run(call))
    assert found.place == Place("interpreter", "cpu", 64, 64)
    assert len(seen) == len(found.trials)


def test_drawn_tensors_hide_nothing(corpus) -> None:
    for name, spec in corpus.items():
        own = canonical(spec)
        q, k, v, *captured = draw(own, Lengths(2, 1, 24, 24), "cpu")
        assert q.shape == (2, own.group_size, 24, own.q.shape[3]), name
        out, lse = own(q, k, v, tuple(captured))
        if name not in (
            "nothing_nearby",
            "mask_as_bias",
        ):  # a band that hides whole rows; floats that stand for a mask
            assert out.isfinite().all(), name
            assert (lse.abs() < 1e6).all(), name


def test_what_rounding_may_do_is_allowed_and_not_much_more(corpus) -> None:
    for name in ("plain", "causal", "left_padded", "sigmoid", "signed"):
        spec = canonical(corpus[name])
        module = store.load(emit(spec, name="limits"))
        tensors = draw(spec, Lengths(1, 1, 80, 80), "cpu")
        found = module.reference(*tensors, work=torch.float32)
        allowed = limits(module, spec, tensors, found)
        assert disagreement(found, module.reference(*tensors), allowed) is None, name
        assert 0 < allowed[0] < 0.02 * float(found[0].abs().max()), name
        moved = (found[0] * 1.03, found[1])
        assert "output 0 is off" in disagreement(moved, found, allowed), name


def test_rows_of_fills_do_not_widen_what_is_allowed(corpus) -> None:
    spec = canonical(corpus["bert"])
    module = store.load(emit(spec, name="limits"))
    q, k, v, pad = draw(spec, Lengths(2, 1, 40, 40), "cpu")
    pad[0] = False
    tensors = (q, k, v, pad)
    found = module.reference(*tensors, work=torch.float32)
    assert limits(module, spec, tensors, found)[0] < 1e-4


def test_without_a_gpu_the_error_is_clear(corpus, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="expected a GPU to measure on, found none"):
        tune(corpus["plain"], SIZES)
    double = parse(str(corpus["causal"]).replace("float32", "float64"))
    with pytest.raises(UnsupportedError, match="expected q, k, v in one of float16"):
        tune(double, SIZES)


PROGRAM = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
from attnc.codegen.triton import Lengths, tune
from attnc.printer import parse
times = iter([2.0, 1.9, 1.0] + [3.0] * 99)
def clock(call):
    call()
    return next(times)
found = tune(parse(sys.argv[1]), Lengths(1, 1, 33, 33), clock=clock, budget=20.0)
print(json.dumps([(str(t.config), t.ms, t.why) for t in found.trials]))
print(found.pick)
"""


def test_kernels_with_other_tiles_agree_in_the_interpreter(corpus) -> None:
    command = [sys.executable, "-c", PROGRAM, str(corpus["left_padded"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    trials = json.loads(done.stdout.splitlines()[0])
    assert len(trials) > 3
    assert [t for t in trials if t[1] is None] == []
    assert done.stdout.splitlines()[1] == trials[2][0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "left_padded"])
def test_a_search_on_a_gpu_finds_tiles_that_are_no_slower(name: str, corpus) -> None:
    found = tune(corpus[name], Lengths(1, 8, 2048, 2048), budget=45.0)
    assert len(found.trials) > 4
    assert found.speedup >= 1.0
    assert picks.find(corpus[name], "forward", found.place) == found.pick
    x = torch.zeros(1 << 24, device="cuda")
    assert event_clock()(lambda: x.add_(1)) > 0
