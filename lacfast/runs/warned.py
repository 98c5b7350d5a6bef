"""Warnings of a command: a line each, without the place in the source that means nothing to who typed it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings within the block are a line each; transformers' news of image processors is left out.

    It comes with every import of a pipeline where torchvision is not installed, and no command needs that.
    """
    processors, formatted = logging.getLogger("transformers.utils.import_utils"), warnings.formatwarning
    processors.addFilter(_is_news)
    warnings.formatwarning = _line
    try:
        yield
    finally:
        warnings.formatwarning = formatted
        processors.removeFilter(_is_news)


def _line(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {message}\n"


def _is_news(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()
