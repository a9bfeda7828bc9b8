"""Loggers and artifacts, switched by ``ATTNC_LOGS`` as ``TORCH_LOGS`` switches torch's.

``ATTNC_LOGS=detect,+rewrite,-verify,spec`` shows detect at info, rewrite at debug, verify at error level, and
prints every spec.  ``ATTNC_LOGS=help`` lists the names.
"""

from __future__ import annotations

import logging
import os

COMPONENTS = ("capture", "normalize", "detect", "analyze", "rewrite", "lower", "codegen", "verify")
ARTIFACTS = ("graph", "spec", "match", "miss", "plan", "diff", "kernel", "onnx", "check", "timing")


def get(component: str) -> logging.Logger:
    """Return the logger of ``component``, a name in COMPONENTS."""
    assert component in COMPONENTS, f"unknown component {component!r}"
    return logging.getLogger(f"attnc.{component}")


def artifact(name: str) -> logging.Logger:
    """Return the logger that prints artifact ``name``, a name in ARTIFACTS."""
    assert name in ARTIFACTS, f"unknown artifact {name!r}"
    return logging.getLogger(f"attnc.artifact.{name}")


def configure(setting: str | None = None) -> str | None:
    """Apply ``setting`` (default: the environment's ``ATTNC_LOGS``); return help text if it asks for help.

    Raises:
        ValueError: a name that is neither a component nor an artifact.
    """
    setting = os.environ.get("ATTNC_LOGS", "") if setting is None else setting
    words = [w.strip() for w in setting.split(",") if w.strip()]
    if "help" in words:
        return f"components: {' '.join(COMPONENTS)}\nartifacts: {' '.join(ARTIFACTS)}"
    for word in words:
        name, level = word.lstrip("+-"), {"+": logging.DEBUG, "-": logging.ERROR}.get(word[0], logging.INFO)
        if name in COMPONENTS:
            get(name).setLevel(level)
        elif name in ARTIFACTS:
            artifact(name).setLevel(logging.DEBUG)
        else:
            raise ValueError(f"ATTNC_LOGS: expected one of {(*COMPONENTS, *ARTIFACTS)}, found {name!r}")
    if words and not logging.getLogger("attnc").handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[attnc.%(name)s] %(message)s"))
        logging.getLogger("attnc").addHandler(handler)
    return None
