"""Compile an emitted kernel ahead of time, for GPUs that are not here, and say what each program needs.

NVIDIA: registers and stack from ``cuobjdump -res-usage``, local loads and stores (LDL, STL) counted in the
SASS; a spill shows as stack above 0.  AMD: what the assembler wrote into the code object's metadata.  The
compiler does not check the shared memory limit, so it is compared here.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from attnc.codegen.triton.configs import SHARED_LIMIT
from attnc.codegen.triton.emit import kind_of, spec_of
from attnc.codegen.triton.kinds import KINDS, Program
from attnc.codegen.triton.store import load
from attnc.errors import CodegenError
from attnc.ir import Kernel

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def report_rows(kernel: Kernel, targets: tuple[str, ...] = TARGETS) -> list[dict[str, Any]]:
    """Compile the programs of ``kernel`` for each target; return one row each for ``attnc emit --report``.

    A row has ``kernel``, ``program`` (the one of its kind), ``target``, ``block_m``, ``block_n``, ``warps``,
    ``stages``, ``registers`` (per thread), ``shared`` and ``shared_limit`` (bytes per block), ``over_limit``,
    ``stack`` (bytes per thread), ``spills`` (local loads and stores, or AMD's count of spilled vector
    registers), and ``error`` (None, or the compiler's last line).

    Raises:
        CodegenError: triton is not installed, or it was imported in interpreter mode.
    """
    module = _jit_module(kernel)
    programs = KINDS[kind_of(kernel.source)].programs
    return [_row(kernel, module, target, program) for target in targets for program in programs]


def _jit_module(kernel: Kernel) -> ModuleType:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise CodegenError("compiling ahead of time needs triton, which is not installed here") from error
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CodegenError("compiling ahead of time: expected TRITON_INTERPRET unset, found 1")
    return load(kernel)


def _row(kernel: Kernel, module: ModuleType, target: str, program: Program) -> dict[str, Any]:
    block_m, block_n, warps, stages = getattr(module, program.configs)[target]
    tiles = {"block_m": block_m, "block_n": block_n, "warps": warps, "stages": stages}
    row: dict[str, Any] = {
        "kernel": kernel.name,
        "program": program.kernel,
        "target": target,
        **tiles,
        "shared_limit": SHARED_LIMIT[target],
    }
    try:
        compiled = compile_for(kernel, module, target, program)
    except _compiler_errors() as error:
        nothing = {"registers": None, "shared": None, "over_limit": None, "stack": None, "spills": None}
        return {**row, **nothing, "error": _reason(error)}
    used = _nvidia(compiled.asm["cubin"]) if target.startswith("sm_") else _amd(compiled.asm["amdgcn"])
    shared = int(compiled.metadata.shared)
    return {**row, **used, "shared": shared, "over_limit": shared > SHARED_LIMIT[target], "error": None}


def _reason(error: BaseException) -> str:
    """Return the last line of the innermost cause: the outer ones only show where it was called from."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return lines[-1] if lines else type(error).__name__


def compile_for(kernel: Kernel, module: ModuleType, target: str, program: Program | None = None) -> Any:
    """Return triton's compiled program for ``target`` (``sm_90``, ``gfx942``), with the module's config.

    ``program`` is one of the kernel's kind, by default its first.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind = KINDS[kind_of(kernel.source)]
    program = program or kind.programs[0]
    block_m, block_n, warps, stages = getattr(module, program.configs)[target]
    fn = getattr(module, f"{kernel.name}_{program.kernel}")
    types, ones = kind.types(spec_of(kernel.source))
    known: dict[str, Any] = {**ones, **program.constants, "BLOCK_M": block_m, "BLOCK_N": block_n}
    constants = {name: known[name] for name in fn.arg_names if name in known}
    signature = {
        name: types.get(name, "constexpr") if name not in ones else "constexpr" for name in fn.arg_names
    }
    # What the launcher's real arguments are: aligned pointers and strides; lengths may be anything.
    aligned = {(i,) for i, n in enumerate(fn.arg_names) if signature[n][0] == "*" or "_" in n}
    attrs = {i: [["tt.divisibility", 16]] for i in aligned if signature[fn.arg_names[i[0]]] != "constexpr"}
    where = (
        GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    )
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=where, options=options)


def _compiler_errors() -> tuple[type[BaseException], ...]:
    """Return what the compiler raises for a config that cannot be built."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return (CompilationError, OutOfResources, PTXASError, RuntimeError)


def _nvidia(cubin: bytes) -> dict[str, int]:
    usage, sass = _cuobjdump(cubin, "-res-usage"), _cuobjdump(cubin, "-sass")
    found = {name: re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK")}
    numbers = {name: int(m[1]) for name, m in found.items() if m}
    if len(numbers) != 2:
        raise CodegenError(f"cuobjdump: expected REG and STACK in its resource usage, found {usage[-200:]!r}")
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {"registers": numbers["REG"], "stack": numbers["STACK"], "spills": spills}


def _cuobjdump(cubin: bytes, option: str) -> str:
    """Run the disassembler that triton ships over a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        raise CodegenError(f"expected triton's disassembler at {tool}, found none")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=False)
    if run.returncode:
        raise CodegenError(f"cuobjdump {option} failed with {run.returncode}: {run.stderr.strip()}")
    return run.stdout


def _amd(assembly: str) -> dict[str, int]:
    names = {"registers": "vgpr_count", "stack": "private_segment_fixed_size", "spills": "vgpr_spill_count"}
    found = {key: re.search(rf"\.{name}:\s+(\d+)", assembly) for key, name in names.items()}
    missing = [names[key] for key, m in found.items() if m is None]
    if missing:
        raise CodegenError(f"amdgcn metadata: expected {missing}, found none of them")
    return {key: int(m[1]) for key, m in found.items() if m}
