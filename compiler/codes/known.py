"""What each stable code of a report means, and what a user can do about it.

A site that was not rewritten carries one code.  ``advice(code)`` is one sentence, ``named(code)`` the row
with the paragraph behind it; both are text about the code, not about one model.  ``tests/test_codes.py``
holds the table and the sources together: every code that is raised has its row, and every row is raised.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache

from attnc.codes.choice import CHOICE
from attnc.codes.detect import DETECT
from attnc.codes.rows import Code
from attnc.codes.scores import SCORES
from attnc.errors import ReportError

__all__ = ["Code", "advice", "codes", "named"]

UNKNOWN = "Report this code together with the lines of the model that it names."


@lru_cache(maxsize=1)
def codes() -> dict[str, Code]:
    """Return all rows by code, in the order in which a site meets them.

    Raises:
        ValueError: a code has two rows.
    """
    out: dict[str, Code] = {}
    for row in (*DETECT, *SCORES, *CHOICE):
        if row.code in out:
            raise ValueError(f"code {row.code}: expected one row, found two")
        out[row.code] = row
    return out


def advice(code: str) -> str:
    """Return what would make it a match, in one sentence; '' for no code."""
    row = codes().get(code)
    return row.advice if row is not None else UNKNOWN if code else ""


def named(code: str) -> Code:
    """Return the row of a code.

    Raises:
        ReportError: there is no such code; the message names the nearest ones.
    """
    row = codes().get(code)
    if row is None:
        near = get_close_matches(code, codes(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "attnc explain lists all"
        raise ReportError(f"explain: expected a code of a report, found {code!r}; {hint}")
    return row
