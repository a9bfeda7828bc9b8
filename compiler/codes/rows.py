"""One row of the table of codes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Code:
    """A stable code: what would make the site a match, in one sentence, and the reasoning behind it."""

    code: str
    advice: str
    paragraph: str

    @property
    def text(self) -> str:
        """The code, its paragraph, and what to do."""
        return f"{self.code}\n\n{self.paragraph}\n\nWhat to do: {self.advice}"
