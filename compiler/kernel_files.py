"""Write the Triton kernels of a model's sites into a folder, one readable file each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnc.codegen.triton import emit_all
from attnc.files import write_directory
from attnc.ir import Kernel
from attnc.report.report import SiteRecord


def write_kernels(
    sites: Sequence[SiteRecord], directory: Path, kinds: Sequence[str], *, force: bool
) -> list[Kernel]:
    """Write the kernels of ``kinds`` for the sites that were found, and return them.

    Raises:
        UnsupportedError: no site can be emitted.
        CodegenError: there is no such kind of kernel.
        CheckpointError: the directory exists and ``force`` is not given, or cannot be written.
    """
    missed = [f"{s.id}: {s.reason}" for s in sites if s.status == "missed"]
    specs = [s.details.get("at_example", s.spec) for s in sites if s.spec and s.status != "missed"]
    kernels = emit_all(specs, missed, kinds)
    with write_directory(directory, force=force) as folder:
        for k in kernels:
            (folder / f"{k.name}.py").write_text(k.source, encoding="utf-8")
    return kernels
