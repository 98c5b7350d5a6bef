"""Named ranges of a training iteration: NVTX for Nsight, torch.profiler on request, nothing otherwise.

    with span("decode"):
        images = backbone.decode(latents)

NVTX ranges lie in the domain "lacfast". They need the nvtx package (lacfast[profile]) and a CUDA device; if
either is missing a span does nothing. In torch.compile it does nothing either, and in a captured graph it
marks the capture.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch

DOMAIN = "lacfast"
SPANS = (
    "rollout/step",
    "rollout/values",
    "rollout/renoising",
    "rollout/order",
    "rollout/wait",
    "rollout/send",
    "decode",
    "reward",
    "reward/wait",
    "advantages",
    "update/old_outputs",
    "update/microbatch",
    "update/all_reduce",
    "shard/gather",
    "shard/sum",
    "optimizer",
    "sync",
)
"""Every name that `span` takes. "sync" is the host waiting for the device, "reward/wait" for scores, which
are computed in a thread of their own: Nsight shows it, torch.profiler does not. "rollout/order" and the two
behind it are of ranks that learn and ranks that sample."""

Item = TypeVar("Item")
Spans = dict[str, AbstractContextManager[Any]]


_recording: list[None] = []
"""One entry for every `recorded_by_torch` that is entered; rewards may be scored in another thread."""


def span(name: str) -> AbstractContextManager[Any]:
    """The context in which the work of that name is done.

    Raises:
        KeyError: for a name that is not in SPANS.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    default = _default_spans()[name]
    # torch's own can be entered only once, nvtx's as often as one likes.
    return torch.profiler.record_function(f"{DOMAIN}/{name}") if _recording else default


def each(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """The items of a loop, whose body runs within the span for every one of them."""
    for item in items:
        with span(name):
            yield item


@contextmanager
def recorded_by_torch() -> Iterator[None]:
    """Within the context spans are torch.profiler's ranges, named "lacfast/..."; they work on a CPU too."""
    _recording.append(None)
    try:
        yield
    finally:
        _recording.pop()


@cache
def _default_spans() -> Spans:
    return nvtx_spans() if torch.cuda.is_available() else dict.fromkeys(SPANS, nullcontext())


def nvtx_spans() -> Spans:
    """A range per name from the nvtx package, or contexts that do nothing where it is not installed."""
    try:
        nvtx: Any = importlib.import_module("nvtx")
    except ImportError:
        return dict.fromkeys(SPANS, nullcontext())
    return {name: nvtx.annotate(name, domain=DOMAIN) for name in SPANS}
