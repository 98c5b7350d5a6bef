"""How a command ends that fails: one line that says what is wrong and what to do, and an exit code."""

from __future__ import annotations

from typing import NamedTuple

from lacfast.runtime.failures import FailedError
from lacfast.runtime.files import is_full
from lacfast.runtime.signals import Stopped

USAGE = 2
"""Exit code where the command cannot be done as it was asked: nothing was trained."""
FAILURE = 1
"""Exit code of a command that began and failed."""
INTERRUPTED = 130
"""Exit code of a command that was stopped by Ctrl-C, as shells know it: 128 and the signal's number."""


class Ending(NamedTuple):
    """What the shell gets."""

    code: int
    line: str
    """What is wrong and what to do; "" where nobody reads it any more, or another rank has said it."""


def ending(error: BaseException) -> Ending | None:
    """The ending by an error; None for one that no setting and no machine explains: a bug of ours."""
    match error:
        case Stopped():
            return Ending(error.exit_code, f"stopped by {error}")
        case KeyboardInterrupt():
            return Ending(INTERRUPTED, "stopped")
        case BrokenPipeError():
            return Ending(FAILURE, "")
        case FailedError() | FloatingPointError():
            return Ending(FAILURE, _one_line(error))
        case ValueError() | ImportError():
            return Ending(USAGE, _one_line(error))
        case MemoryError():
            return Ending(FAILURE, f"out of memory: {_one_line(error)}; {_LESS_MEMORY}")
        case RuntimeError():
            return _of_work(error)
        case OSError() if is_full(error):
            return Ending(FAILURE, _one_line(error))
        case OSError():
            return Ending(FAILURE, f"the system refused: {_one_line(error)}; mend that and start again")
    return None


def _of_work(error: RuntimeError) -> Ending | None:
    """The ending by an error of what runs on torch."""
    # Its import takes longer than all else of a command that is refused.
    import torch

    from lacfast.distributed import LostRankError, ToldElsewhereError

    if isinstance(error, ToldElsewhereError):
        return Ending(FAILURE, "")
    if isinstance(error, LostRankError):
        return Ending(FAILURE, _one_line(error))
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
        return Ending(FAILURE, f"out of memory: {_one_line(error)}; {_LESS_MEMORY}")
    return None


_LESS_MEMORY = (
    "sample and train less at a time with --train.rollout-batch-size and --train.ppo.microbatch-size, or "
    "--batch-size of evaluate; --dry-run says what needs it"
)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
