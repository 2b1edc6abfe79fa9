"""Errors that callers may want to catch by type.

Every message says what was expected, what came, and what to do. Errors that are plainly about
one argument stay ``ValueError`` or ``TypeError``; the classes here exist where a caller acts
differently on them (skip a video, shorten a prompt).
"""

from __future__ import annotations


class LongVILAError(Exception):
    """Base class of the errors this package defines."""


class VideoError(LongVILAError, ValueError):
    """A video could not be opened or gave no frame; the message names the file."""


class ContextLengthError(LongVILAError, ValueError):
    """A prompt, with the tokens asked for, is longer than the model's context."""


class CheckpointError(LongVILAError, ValueError):
    """A checkpoint is incomplete or does not fit the model; the message names the tensors."""


class ModelError(LongVILAError, TypeError):
    """A model is of a kind that is not known, or that cannot do what is asked of it."""


class RankError(LongVILAError, RuntimeError):
    """One or more ranks failed; the message carries the traceback of each."""
