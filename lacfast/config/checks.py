"""The check that settings share."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """
    Raises:
        ValueError: with the message, unless the condition holds.
    """
    if not condition:
        raise ValueError(message)
