"""A failing program as a script of its own, which needs torch and attnc only."""

from __future__ import annotations

import inspect
import pprint
from pathlib import Path

from tests.fuzz.check import VIEWS, Outcome, Run, allowance, runs_of
from tests.fuzz.program import Program, rendered
from tests.fuzz.text import Input

IMPORTS = """\
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import attnc
from attnc.codegen import ops
from attnc.passes.detect import detect
from attnc.passes.rewrite.apply import Rewriter

Sizes = dict
aten = torch.ops.aten
"""
TRACED = '''
def rewritten(args):
    """Trace the program, rewrite every site that nothing blocks, return what runs."""
    views = [{views}]
    table = {{op: op.decompose for op in views}}
    with torch.no_grad():
        module = make_fx(attention, table, "{mode}", pre_dispatch=True, _allow_non_fake_inputs=True)(*args)
    graph = module.graph
    stored = {{n.name: getattr(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}}
    found, missed = detect(graph, stored)
    editor = Rewriter(graph, graph, {{n.name: n.name for n in graph.nodes}})
    for miss, name in missed:
        print("missed", name, miss.code, miss.why)
    for site in [f for f in found if not f.match.escapes and editor.blocked(f) is None]:
        print("rewritten", site.match.spec)
        editor.apply(site)
    module.recompile()
    return module
'''
EXPORTED = '''
class Program(torch.nn.Module):
    def forward(self, *args):
        return attention(*args)


def rewritten(args):
    """Rewrite the program through the public door, without the check that would put a wrong site back."""
    fast = attnc.optimize(Program(), args, dynamic_shapes={shapes}, verify=False, cost_model=False)
    print(fast.report)
    return fast
'''
MAIN = """
def main():
    runs = []
    for sizes, seed, how in RUNS:
        g = torch.Generator().manual_seed(seed)
        runs.append(tuple(i.draw(sizes, g, how) for i in INPUTS))
    fast = rewritten(runs[0])
    for args in runs:
        found, wanted = fast(*[a.clone() for a in args]), attention(*[a.clone() for a in args])
        for a, b in zip(found, wanted) if isinstance(wanted, tuple) else [(found, wanted)]:
            torch.testing.assert_close(a, b, rtol=1e-9, atol={atol!r}, equal_nan=True)
    print("equal")


if __name__ == "__main__":
    main()
"""


def script(o: Outcome) -> str:
    """Return the text of the script that shows the failure of ``o``."""
    x = o.spelling
    p = rendered(x)
    runs = runs_of(p)
    why = o.why.strip().replace('"""', "'''")
    if x.trace.startswith("exported"):
        door = EXPORTED.format(shapes='"auto"' if "symbolic" in x.trace else None)
    else:
        mode = "symbolic" if x.trace == "symbolic" else "fake"
        door = TRACED.format(views=", ".join(map(str, VIEWS)), mode=mode)
    parts = [
        f'"""{o.verdict}: {x}\n\n{why}\n"""\n\n{IMPORTS}',
        p.text,
        inspect.getsource(Input),
        _inputs(p, runs),
        door,
        MAIN.format(atol=max(allowance(x, p.draw(*run)) for run in runs)),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _inputs(p: Program, runs: list[Run]) -> str:
    lines = "\n".join(f"    {i!r}," for i in p.inputs)
    return f"INPUTS = (\n{lines}\n)\nRUNS = {pprint.pformat(runs, width=100)}"


def save(o: Outcome, folder: Path) -> Path:
    """Write the script into ``folder``; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{o.verdict}_{o.spelling.seed}.py"
    path.write_text(script(o), encoding="utf-8")
    return path
