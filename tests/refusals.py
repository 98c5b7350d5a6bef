"""What raises, and its row of docs/errors.md: message, cause and remedy are one assertion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest


class Refusal(NamedTuple):
    """An error that a user meets. All is written literally: `python docs/errors.py` reads it in the tests.

    In a test: `with Refusal("gamma=2 must", cause="A discount above 1.", remedy="use 1").raised(): ...`,
    or a row of `parametrize`.
    """

    message: str
    """A part of the error's text that says what is wrong."""
    cause: str
    """What leads there, a sentence."""
    remedy: str
    """A part of the error's text that says what to do."""
    error: type[BaseException] = ValueError

    @contextmanager
    def raised(self) -> Iterator[pytest.ExceptionInfo[BaseException]]:
        """The block raises the error with both parts in its text."""
        with pytest.raises(self.error) as caught:
            yield caught
        self.check(str(caught.value))

    def check(self, text: str) -> None:
        """What was printed or raised has both parts."""
        assert self.cause, "say in a sentence what leads there"
        assert self.message in text, text
        assert self.remedy in text, text
