"""attnc: find attention in any PyTorch model and rewrite it into checked, faster forms."""

from __future__ import annotations

if __name__ != "attnc":
    raise ImportError("import attnc, not the folder: see CONTRIBUTING.md")

__version__ = "0.1.0"
