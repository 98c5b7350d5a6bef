"""What may fail on some of the ranks, with one end for all."""

from __future__ import annotations

from collections.abc import Callable

from lacfast.distributed import World
from lacfast.runtime.failures import FailedError


def agreed(world: World, work: Callable[[], None], what: str) -> None:
    """Do some work on every rank; where it fails on one, all end with its error, which names the rank.

    Args:
        world: the ranks, all of which call it.
        work: raises a ValueError or an ImportError where it fails.
        what: it is, for messages.

    Raises:
        ValueError: of the first rank on which it failed; a FailedError where it was one.
        ImportError: the same.
    """
    failure: ValueError | ImportError | None = None
    try:
        work()
    except (ValueError, ImportError) as error:
        failure = error
    kind = next((each for each in (FailedError, ImportError) if isinstance(failure, each)), ValueError)
    told = world.entries([None if failure is None else (kind, str(failure))], what)
    failed = [rank for rank, each in enumerate(told) if each is not None]
    if not failed:
        return
    first = told[failed[0]]
    assert first is not None
    kind, text = first
    if failure is not None and all(each == first for each in told):
        raise failure
    raise kind(f"rank {failed[0]} of {world.size}: {text}")
