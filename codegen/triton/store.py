"""Keep emitted kernels as files, named by what they contain, and import them.

The folder is ``${XDG_CACHE_HOME:-~/.cache}/attnc/kernels``.  A file is only ever written whole (temporary
sibling, then rename) and is compared with the source before it is imported, so neither a crash nor a
stranger's file matters.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from attnc import logs
from attnc.errors import CodegenError
from attnc.ir import Kernel

log = logs.get("codegen")


def folder() -> Path:
    """Return where kernels are kept; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "attnc" / "kernels"


def write(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def keep(kernel: Kernel, place: Path | None = None) -> Path:
    """Return the path of a file that holds exactly the kernel's source; write it if it is not there.

    ``place`` is the folder, by default the cache.  Where it cannot be written, the file goes to a new
    temporary folder.
    """
    place = place or folder()
    path = place / f"{kernel.name}_{kernel.key}.py"
    try:
        if not path.is_file() or path.read_text(encoding="utf-8") != kernel.source:
            write(path, kernel.source)
    except OSError as error:
        path = Path(tempfile.mkdtemp(prefix="attnc-")) / path.name
        log.warning("cannot keep kernels in %s (%s); this one goes to %s", place, error, path)
        write(path, kernel.source)
    return path


def load(kernel: Kernel, place: Path | None = None) -> ModuleType:
    """Import the kernel's file under a name of its own; a second call gives the same module.

    ``place`` is the folder of the file, by default the cache.

    Raises:
        CodegenError: the file does not import.
    """
    return _imported(kernel, place, "")


def load_apart(kernel: Kernel, purpose: str) -> ModuleType:
    """Import the kernel's file as a second module, whose names may be replaced for a purpose of its own."""
    return _imported(kernel, None, f"_{purpose}")


def _imported(kernel: Kernel, place: Path | None, suffix: str) -> ModuleType:
    name = f"attnc_kernel_{kernel.name}_{kernel.key}{suffix}"
    if name in sys.modules:
        return sys.modules[name]
    path = keep(kernel, place)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, f"{path} has no import spec"
    assert spec.loader is not None, f"{path} has no loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # triton reads the source of its functions through the module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[name]
        raise CodegenError(f"kernel {kernel.name}: cannot import {path}: {error}") from error
    return module
