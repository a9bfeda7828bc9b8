"""Find the loops over keys in a kernel's SASS: what one turn executes, and whether it spills.

A loop is the natural loop of a backward branch (Aho, Lam, Sethi, Ullman: Compilers, section 9.6.6), so waits
that the assembler moved out of line belong to the loop they return to.  Instructions count as they stand:
those on both sides of a branch, and one round of a wait.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)([^;]*);.*$", re.MULTILINE)
_TENSOR_CORE = re.compile(r"([DHIQ]|[HIQ]G|UTC[HIOQ])MMA")
_ENTRY = -1


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of SASS: address, name without its suffixes, the address it may branch to, what may follow."""

    address: int
    text: str
    operation: str
    target: int | None
    falls_through: bool


Loop = tuple[Instruction, ...]
"""The instructions of a loop, in order of address."""


def inner_loops(sass: str) -> list[Loop]:
    """Return the innermost loops that form products, in order of address.

    Products are those of tensor cores, or fused multiply-adds in a kernel that uses no tensor core.
    """
    code = _read(sass)
    multiply = {x.operation for x in code if _TENSOR_CORE.fullmatch(x.operation)} or {"FFMA"}
    graph = _flow(code)
    found = []
    for header, tails in _back_edges(graph).items():
        body = _natural(graph, header, tails)
        if any(x.operation in multiply for x in code if x.address in body):
            found.append(body)
    innermost = [b for b in found if not any(other < b for other in found)]
    return [tuple(x for x in code if x.address in b) for b in sorted(innermost, key=min)]


def products(loop: Loop, warps: int) -> int | None:
    """Return how many products of two numbers one turn forms on tensor cores, in all warps together.

    None where an instruction does not show its size, as on Blackwell.
    """
    total = 0
    for x in loop:
        if not _TENSOR_CORE.fullmatch(x.operation):
            continue
        size = re.search(r"MMA\.(?:\w+\.)?(?:(\d+)x(\d+)x(\d+)|(\d\d)(\d)(\d+))\b", x.text)
        if size is None:
            return None
        m, n, k = (int(n) for n in size.groups() if n is not None)
        total += m * n * k * (warps // 4 if size[1] else warps)  # 64x128x16 by four warps, 16816 by one
    return total


def _read(sass: str) -> list[Instruction]:
    return [_instruction(m) for m in _LINE.finditer(sass)]


def _instruction(line: re.Match[str]) -> Instruction:
    address, predicate, name, operands = line.groups()
    operation = name.split(".")[0]
    targets = re.findall(r"0x([0-9a-f]+)", operands) if operation in ("BRA", "CALL", "JMP") else []
    # A branch may also carry its condition as an operand, or in its name (BRA.DIV).
    bare = predicate is None and not re.search(r"\bU?P\d", operands)
    leaves = bare and name.removesuffix(".REL.NODEC") in ("BRA", "BRX", "JMP", "EXIT", "RET")
    target = int(targets[-1], 16) if targets else None
    return Instruction(int(address, 16), line[0], operation, target, not leaves)


def _flow(code: list[Instruction]) -> Any:
    """Return which address may follow which, from ``_ENTRY`` on."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(x.address for x in code)
    for x, following in zip(code, [*code[1:], None], strict=True):
        if x.falls_through and following is not None:
            graph.add_edge(x.address, following.address)
        if x.target is not None:
            graph.add_edge(x.address, x.target)
    # What nothing leads to is reached by an indirect branch.
    first = [n for n in graph if n == code[0].address or not graph.in_degree(n)]
    graph.add_edges_from((_ENTRY, n) for n in first)
    return graph


def _back_edges(graph: Any) -> dict[int, set[int]]:
    """Return, for each header of a loop, the addresses that jump back to it."""
    import networkx as nx

    above = nx.immediate_dominators(graph, _ENTRY)
    edges: dict[int, set[int]] = {}
    for tail, header in graph.edges:
        if header <= tail and tail in above and header in _dominators(above, tail):
            edges.setdefault(header, set()).add(tail)
    return edges


def _dominators(above: dict[int, int], node: int) -> Iterator[int]:
    yield node
    while node != _ENTRY:
        node = above[node]
        yield node


def _natural(graph: Any, header: int, tails: set[int]) -> set[int]:
    """Return the header and all that reaches a tail without passing it."""
    body, todo = {header}, list(tails)
    while todo:
        node = todo.pop()
        if node not in body:
            body.add(node)
            todo += graph.predecessors(node)
    return body
