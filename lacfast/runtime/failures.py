"""The error of work that failed although it was asked for rightly."""

from __future__ import annotations


class FailedError(ValueError):
    """A reward, a disk or a file was not what a run needs; the command line exits with 1, not with 2."""
