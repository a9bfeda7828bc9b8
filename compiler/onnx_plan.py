"""Say of a site found in an ONNX file whether it is rewritten, and why not."""

from __future__ import annotations

from typing import Any

from attnc import logs
from attnc.ir import Miss, Plan
from attnc.passes.analyze.operands import Namer
from attnc.passes.detect import Found
from attnc.passes.rewrite.apply import Rewriter
from attnc.records import Job

log = logs.get("rewrite")

LEAST_OPSET = 18
"""The first opset that has all operators, in their present form, that a rewritten site is written with."""


def planned(found: Found, gate: Rewriter, opset: int, cost_model: bool) -> Job:
    """Plan one site; one on which planning raises is left as it is."""
    try:
        status, miss = _left(found, gate, opset, cost_model)
    except Exception as error:  # a mistake of ours must not take the user's model down
        job = Job(found, None, "kept", None, None, None)
        job.stumble(error)
        return job
    if miss is not None:
        return Job(found, None, status, miss, None, None)
    return Job(found, Plan(found.match, "fused", "", "SAME", found.match.spec), "rewritten", None, None, None)


def _left(found: Found, gate: Rewriter, opset: int, cost_model: bool) -> tuple[str, Miss | None]:
    """Return status and reason of a site that stays as it is, ("", None) of one that does not."""
    if found.fused and not found.improves:
        return "kept", Miss("already-fused", found.anchor, "the file has one fused operator here")
    if opset < LEAST_OPSET:
        why = f"the file has opset {opset}, and the rewritten site needs {LEAST_OPSET}"
        return "kept", Miss("opset-too-old", found.anchor, why)
    if found.match.escapes and cost_model:
        why = f"{', '.join(found.match.escapes)} is read outside the site, and a fused operator comes on top"
        return "kept", Miss("weights-in-use", found.match.escapes[0], why)
    blocked = gate.blocked(found)
    return ("missed", blocked) if blocked is not None else ("", None)


def named(namer: Namer, found: Found) -> dict[str, Any]:
    """Return what is known of a site's operands; a name is a service, and never costs a rewrite."""
    try:
        names = namer.names(found)
    except Exception as error:  # a mistake of ours must not take the user's model down
        log.warning("%s: its operands could not be named", found.match.site.id, exc_info=error)
        return {}
    return {"operands": names} if names else {}
