"""Compile an emitted kernel ahead of time, for GPUs that are not here, and say what each program needs.

NVIDIA: registers and stack from ``cuobjdump -res-usage``, instructions counted in the SASS; a spill shows as
stack above 0 and as local loads and stores (LDL, STL).  AMD: what the assembler wrote into the code object's
metadata, instructions counted in its text.  The compiler does not check the shared memory limit, so it is
compared here.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from attnc.codegen.triton.configs import SHARED_LIMIT, descriptor_arches
from attnc.codegen.triton.emit import kind_of, spec_of
from attnc.codegen.triton.kinds import KINDS, TARGETS, Program
from attnc.codegen.triton.loops import inner_loops
from attnc.codegen.triton.store import load
from attnc.errors import CodegenError
from attnc.ir import Kernel

INSTRUCTIONS = {
    "instructions": r"(?!NOP\b)",
    "hmma": r"[DHIQ]MMA\b",  # by one warp: mma.sync
    "hgmma": r"[HIQ]GMMA\b",  # by a Hopper warp group, from shared memory: wgmma
    "utcmma": r"UTC[HIOQ]MMA\b",  # by a Blackwell tensor core, into its own memory: tcgen05.mma
    "mfma": r"v_mfma_",  # by an AMD wave
    "tma_loads": r"UTMALDG\b",
    "async_copies": r"LDGSTS\b",  # cp.async
    "exp2": r"MUFU\.EX2\b|v_exp_f32",
    "spills": r"(LDL|STL)\b",
}
"""What a row counts in a kernel's assembly: a name, and a pattern for the start of an instruction."""

_INSTRUCTION = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\S*)|([a-z]+_\w+))", re.MULTILINE)
"""An instruction in SASS (its address first, then perhaps a predicate), or in AMD's assembly."""


def report_rows(kernel: Kernel, targets: tuple[str, ...] = TARGETS) -> list[dict[str, Any]]:
    """Compile ``kernel`` for each target; return rows for ``attnc emit --report``, one per program.

    A row has ``kernel``, ``program`` (the entry point, and how it was compiled), ``target``, ``block_m``,
    ``block_n``, ``warps``, ``stages``, ``registers`` (per thread), ``shared`` and ``shared_limit`` (bytes
    per block), ``over_limit``, ``stack`` (bytes per thread), a count for each of ``INSTRUCTIONS``
    (``spills``: local loads and stores, or AMD's count of spilled vector registers), ``loop_instructions``
    and ``loop_spills`` (in one turn of the shortest loop over keys, and of all; None for AMD), and ``error``
    (None, or the compiler's last line).

    Raises:
        CodegenError: triton is not installed, or it was imported in interpreter mode.
    """
    module = _jit_module(kernel)
    return [_row(kernel, module, target, program) for target, program in programs(kernel, targets)]


def programs(kernel: Kernel, targets: tuple[str, ...] = TARGETS) -> list[tuple[str, Program]]:
    """Return the ways in which the launcher of an emitted file may compile its kernels, per target."""
    kind, spec = KINDS[kind_of(kernel.source)], spec_of(kernel.source)
    found = [(t, p) for t in targets for p in (*kind.programs, *kind.more(spec)) if t in p.targets]
    described = descriptor_arches(spec)
    return [(t, p) for t, p in found if t in described or not p.constants.get("DESCRIPTORS")]


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
        "program": " ".join(filter(None, (program.kernel, program.variant))),
        "target": target,
        **tiles,
        "shared_limit": SHARED_LIMIT[target],
    }
    try:
        compiled = compile_for(kernel, module, target, program)
    except _compiler_errors() as error:
        loops = ("loop_instructions", "loop_spills")
        unknown = ("registers", "stack", *INSTRUCTIONS, *loops, "shared", "over_limit")
        return {**row, **dict.fromkeys(unknown), "error": _reason(error)}
    used = _nvidia(compiled.asm["cubin"]) if target.startswith("sm_") else _amd(compiled.asm["amdgcn"])
    shared = int(compiled.metadata.shared)
    return {**row, **used, "shared": shared, "over_limit": shared > SHARED_LIMIT[target], "error": None}


def _reason(error: BaseException) -> str:
    """Return the last line of the innermost cause: the outer ones only show where it was called from."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return lines[-1] if lines else type(error).__name__


def compile_for(kernel: Kernel, module: ModuleType, target: str, program: Program) -> Any:
    """Return triton's compiled program for ``target`` (``sm_90``, ``gfx942``), with the module's config."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind = KINDS[kind_of(kernel.source)]
    block_m, block_n, warps, stages = getattr(module, program.configs)[target]
    fn = getattr(module, f"{kernel.name}_{program.kernel}")
    types, ones = kind.types(spec_of(kernel.source))
    known: dict[str, Any] = {**ones, **program.constants, "BLOCK_M": block_m, "BLOCK_N": block_n}
    constants = {name: known[name] for name in fn.arg_names if name in known}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "constexpr") for name in fn.arg_names
    }
    # What the launcher's real arguments are: aligned pointers and strides; lengths may be anything.
    aligned = {(i,) for i, n in enumerate(fn.arg_names) if signature[n][0] == "*" or n[-2:-1] == "_"}
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


def count_instructions(assembly: str) -> dict[str, int]:
    """Return how often each of ``INSTRUCTIONS`` occurs in SASS or in AMD's assembly."""
    found = [nvidia or amd for nvidia, amd in _INSTRUCTION.findall(assembly)]
    return {name: sum(bool(re.match(p, x)) for x in found) for name, p in INSTRUCTIONS.items()}


def disassemble(cubin: bytes) -> str:
    """Return a cubin's resource usage and its SASS, by the disassembler that triton ships.

    Raises:
        CodegenError: it is not there, or it fails.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        raise CodegenError(f"expected triton's disassembler at {tool}, found none")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise CodegenError(f"cuobjdump failed with {run.returncode}: {run.stderr.strip()}")
    return run.stdout


def usage(sass: str) -> dict[str, int]:
    """Return ``registers`` and ``stack`` (bytes), per thread, from what ``disassemble`` gave."""
    return _numbers({"registers": "REG", "stack": "STACK"}, r"\b{}:(\d+)", sass)


def _nvidia(cubin: bytes) -> dict[str, int | None]:
    sass = disassemble(cubin)
    turns = [count_instructions("\n".join(x.text for x in loop)) for loop in inner_loops(sass)]
    return {
        **usage(sass),
        **count_instructions(sass),
        "loop_instructions": min((t["instructions"] for t in turns), default=None),
        "loop_spills": sum(t["spills"] for t in turns),
    }


def _amd(assembly: str) -> dict[str, int | None]:
    names = {"registers": "vgpr_count", "stack": "private_segment_fixed_size", "spills": "vgpr_spill_count"}
    found = {**count_instructions(assembly), **_numbers(names, r"\.{}:\s+(\d+)", assembly)}
    return {**found, "loop_instructions": None, "loop_spills": None}


def _numbers(names: dict[str, str], pattern: str, text: str) -> dict[str, int]:
    """Return the number that stands behind each name in a compiler's report."""
    found = {key: re.search(pattern.format(name), text) for key, name in names.items()}
    missing = [names[key] for key, m in found.items() if m is None]
    if missing:
        raise CodegenError(f"compiler's report: expected {list(names.values())}, found no {missing}")
    return {key: int(m[1]) for key, m in found.items() if m}
