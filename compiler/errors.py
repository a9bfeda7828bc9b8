"""Errors a user can meet: each says what was being done, what was expected, what was found, what to do."""

from __future__ import annotations


class AttncError(Exception):
    """Base of all errors that attnc raises on purpose."""


class CaptureError(AttncError):
    """The model could not be captured as a graph, or failed on the example inputs."""


class RewriteError(AttncError):
    """A plan could not be applied: unknown form, bad option, unknown site."""


class UnknownSiteError(RewriteError):
    """A pattern of the user's forms names no site."""


class UnsupportedError(AttncError):
    """A spec asks for something that the chosen backend does not have."""


class CodegenError(AttncError):
    """Source or a model file could not be emitted."""


class VerifyError(AttncError):
    """A rewritten site or model disagrees with the original beyond its tolerance."""


class CheckpointError(AttncError):
    """A checkpoint cannot be read or written: missing, truncated, corrupt, refused, or no room."""


class ReportError(AttncError):
    """A report was asked for something that it does not have, such as an unknown code."""
