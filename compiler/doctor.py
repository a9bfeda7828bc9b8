"""Say what this machine can run: versions, processors, compilers, runtimes, and where caches lie."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from attnc.manifest import installed_versions

Health = Literal["ok", "missing", "broken"]

REQUIRED = (
    "attnc",
    "torch",
    "numpy",
    "onnx",
    "onnxscript",
    "safetensors",
    "networkx",
    "jinja2",
    "typer",
    "rich",
)
OPTIONAL = {
    "transformers": "Hugging Face folders cannot be opened; pip install 'attnc[hf]'",
    "triton": "no Triton kernels; attnc emit cannot compile them",
}
RUNTIMES = ("onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor: what was looked at, what was found, and what its absence means."""

    name: str
    value: str
    health: Health = "ok"
    hint: str = ""


def examine() -> list[Finding]:
    """Look at everything.  Only tiny probes are run, and only what they found is kept, in attnc's cache."""
    return [*_versions(), *_processors(), *_compiler(), *_runtime(), *_caches()]


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    found = installed_versions((*REQUIRED, *OPTIONAL, *RUNTIMES))
    for name in REQUIRED:
        yield _version(name, found, "attnc needs it; reinstall attnc", "broken")
    for name, hint in OPTIONAL.items():
        yield _version(name, found, hint, "missing")
    name = next((n for n in RUNTIMES if n in found), RUNTIMES[-1])
    yield _version(name, found, "ONNX models can be written but not checked", "missing")


def _version(name: str, found: dict[str, str], hint: str, health: Health) -> Finding:
    return Finding(name, found[name]) if name in found else Finding(name, "not installed", health, hint)


def _processors() -> Iterator[Finding]:
    from attnc.codegen.int8.linear import int_mm_is_exact

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kind = torch.backends.cpu.get_cpu_capability()
    yield Finding("cpu", f"{cores} cores, {kind}, torch uses {torch.get_num_threads()} threads")
    exact = int_mm_is_exact()
    hint = "" if exact else "int8 layers take a slower exact way on this processor"
    yield Finding("int8 matmul", "exact" if exact else "saturates", "ok" if exact else "missing", hint)
    if not torch.cuda.is_available():
        yield Finding(
            "cuda", "no device", "missing", "kernels are emitted and compiled, but run only on a GPU"
        )
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        yield Finding(f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}")


def _compiler() -> Iterator[Finding]:
    """Try whether FlexAttention compiles: seconds the first time, remembered per machine."""
    from attnc.codegen.flex.probe import why_not

    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    yield Finding("C++ compiler", found or "none found", "ok" if found else "missing")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        why = why_not(device)
        hint = f"{why}; windows run as overlapping views instead" if why else ""
        yield Finding(f"flex on {device}", "no" if why else "compiles", "missing" if why else "ok", hint)


def _runtime() -> Iterator[Finding]:
    """Run a tiny model for each claim that exports rely on; an operator that agrees gets one line."""
    if importlib.util.find_spec("onnxruntime") is None:
        return
    from attnc.codegen.onnx.probe import check_runtime

    agreed: Counter[str] = Counter()
    for row in check_runtime():
        name = row.operator.rpartition(".")[2]
        if row.ok and row.expected == "agrees":
            agreed[name] += 1
            continue
        hint = (
            "" if row.ok else f"expected {row.expected}; exports take another operator where a site disagrees"
        )
        value = row.found.partition(", tolerance")[0]
        yield Finding(f"{name}, {row.claim}", value, "ok" if row.ok else "missing", hint)
    for name, tried in agreed.items():
        yield Finding(name, f"does what its table says: {tried} tried")


def _caches() -> Iterator[Finding]:
    from attnc.cost import cache_dir

    places = {
        "torch inductor": Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", _inductor_default())),
        "triton": Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")),
        "attnc": cache_dir(),
    }
    for name, path in places.items():
        state = "" if path.exists() else " (not made yet)"
        parent = next(p for p in (path, *path.parents) if p.exists())
        writable = os.access(parent, os.W_OK)
        hint = "" if writable else "it cannot be written; measurements are made anew in each run"
        yield Finding(f"{name} cache", f"{path}{state}", "ok" if writable else "broken", hint)


def _inductor_default() -> str:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return default_cache_dir()
