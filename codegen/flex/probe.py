"""Find out once per machine whether FlexAttention compiles: on CPU it needs a C++ compiler, else Triton.

A tiny attention is compiled and compared with a softmax.  The answer is kept in ``flex.json`` in
``${ATTNC_CACHE_DIR}`` or ``${XDG_CACHE_HOME:-~/.cache}/attnc``, keyed by torch's version and by what the
compiler depends on.  Nothing happens at import.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from attnc import logs

log = logs.get("codegen")

TOLERANCE = 1e-4
"""The largest error of the tiny attention: 32 terms are good to 1e-5, a wrong kernel is off by 0.1."""


@lru_cache(maxsize=8)
def why_not(device: str) -> str:
    """Return why FlexAttention does not compile for ``cpu`` or ``cuda`` here, an empty text if it does."""
    absent = _absent(device)
    if absent:
        return absent
    path, key = folder() / "flex.json", _key(device)
    known = _read(path)
    if key not in known:
        known = {**known, key: _try(device)}
        _write(path, known)
    return known[key]


def folder() -> Path:
    """Return the folder of attnc's caches; it may not exist yet."""
    own = os.environ.get("ATTNC_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnc"


def _absent(device: str) -> str:
    """Return what is switched off or not there, which is asked anew in each process."""
    if device not in ("cpu", "cuda"):
        return f"FlexAttention is used on cpu and cuda, not on {device}"
    if device == "cuda" and not torch.cuda.is_available():
        return "this machine has no CUDA device to compile FlexAttention for"
    if torch._dynamo.config.disable:
        return "torch.compile is switched off (TORCHDYNAMO_DISABLE)"
    return ""


def _key(device: str) -> str:
    """Name everything the answer depends on."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    found = next((p for c in compilers if c and (p := shutil.which(c))), "none")
    kind = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {device} {kind}, CXX={compilers[0]}, compiler {found}"


def _try(device: str) -> str:
    """Compile and run a tiny attention; return what went wrong."""
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported
    from torch._inductor.exc import InductorError
    from torch.nn.attention.flex_attention import flex_attention

    def attend(x: torch.Tensor) -> torch.Tensor:
        out = flex_attention(x, x, x, score_mod=lambda score, b, h, q, k: score * 0.5)
        assert isinstance(out, torch.Tensor)
        return out

    log.info("trying whether FlexAttention compiles for %s (once per machine)", device)
    try:
        with _disable_current_modes(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.linspace(-1, 1, 32 * 16, device=device).sin().view(1, 1, 32, 16)
            found = torch.compile(attend, fullgraph=True)(x)
            expected = torch.softmax(x @ x.mT / 8, -1) @ x
    except (InductorError, BackendCompilerFailed, Unsupported) as error:
        return f"FlexAttention does not compile for {device}: {str(error).strip().splitlines()[0][:200]}"
    error_found = float((found - expected).abs().max())
    return "" if error_found <= TOLERANCE else f"FlexAttention is wrong by {error_found:.1e} on {device}"


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and all(isinstance(x, str) for pair in found.items() for x in pair)
    return found if whole else {}


def _write(path: Path, known: dict[str, str]) -> None:
    """Write the answers so that a reader sees the old file or the whole new one; without room, ask again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(known, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("cannot keep what was found out about FlexAttention in %s: %s", path, error)
