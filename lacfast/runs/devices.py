"""Devices and dtypes as settings name them, and as torch has them."""

from __future__ import annotations

import torch

from lacfast.distributed import World
from lacfast.runs.config import Dtype


def torch_device(name: str) -> str:
    """The device of that name; for an empty one a GPU if there is one.

    Raises:
        ValueError: for one that torch does not know or that is not here, or a numbered one of several ranks.
    """
    if World.current().size > 1 and ":" in name:
        raise ValueError(f"device={name!r} would be that of every rank; leave the number to the launcher")
    found = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(found)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is no device of torch; write cpu, cuda or cuda:1") from error
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"device={name!r} cannot be used here: {reason}; see `lacfast info`, or leave the option out for "
            "what there is"
        ) from error
    return found


def torch_dtype(name: Dtype) -> torch.dtype | None:
    """The dtype of that name; None for float32, which loads a model as it is saved."""
    return None if name == "float32" else getattr(torch, name)
