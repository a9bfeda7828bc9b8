"""Hold what capture hands to the passes: the user's graph, a functional copy, and the links between them.

The passes read ``work`` and edit ``graph``.  They differ because an exported graph still holds in-place ops,
on which following arguments is wrong, while the functional copy spells casts, views and dropout differently
from the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import fx

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Door = Literal["export", "dynamo", "graph"]


@dataclass
class Captured:
    """One captured graph, ready to be detected on and edited.

    Attributes:
        door: how it was captured.
        owner: the GraphModule that owns ``graph``.
        graph: the user's graph; a rewrite edits this one, in place.
        work: a functional copy to detect on; the same object as ``graph`` at the dynamo door.
        links: node name in ``work`` -> name of the node of ``graph`` that holds the same value for the rest
            of the run.  No entry means no such node is known.
        moments: the same for calls that have the same value when they are made, though their storage may be
            written later: they can be replaced, not read.  None where ``graph`` is functional.
        tensors: inputs of ``work`` that are parameters, buffers or lifted constants -> the live tensor; None
            where it cannot be reached, or where the program itself writes to it, so that it is no constant.
        fqn: the same names -> fully qualified name in the model, where known.
        user_inputs: placeholders of ``work`` that are the user's inputs, in order.
        exported: the program whose graph is ``graph`` (export and graph doors).
        static: input sizes that are fixed in this program, as text: ``"input_ids dim 0 == 2"``.
        warnings: what the user should know about this capture.
        seconds: stage -> seconds.
        branches: branches of ``torch.cond`` that may hold attention, each a functional graph of its own, by
            the name under which ``owner`` holds it; a rewritten one has to be put there.
        sites: ids of the sites that were found, once they are.
    """

    door: Door
    owner: fx.GraphModule
    graph: fx.Graph
    work: fx.Graph
    links: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor | None]
    fqn: Mapping[str, str]
    user_inputs: tuple[str, ...]
    exported: ExportedProgram | None
    moments: Mapping[str, str] | None = None
    static: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    branches: tuple[tuple[str, Captured], ...] = ()
    sites: tuple[str, ...] = ()
