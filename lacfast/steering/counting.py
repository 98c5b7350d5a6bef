"""Counts the model's forwards where they happen: by hooks on the model and on every copy of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class EvaluationCounter:
    """Latents that went through a model and gradients that came back to them."""

    def __init__(self) -> None:
        self.forwards = 0
        self.backwards = 0

    @contextmanager
    def counting(self, model: nn.Module, others: Iterable[nn.Module]) -> Iterator[None]:
        """Within the context, every forward of `model`, or of its like inside `others`, counts its batch."""
        found = {id(model): model}
        for other in others:
            found |= {id(part): part for part in other.modules() if type(part) is type(model)}
        handles = [
            part.register_forward_pre_hook(self._count_forward, with_kwargs=True) for part in found.values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else next(iter(kwargs.values()))
        self.forwards += len(sample)

    def watch(self, sample: Tensor) -> Tensor:
        """`sample` (B, ...), which requires grad; its gradient's arrival counts B backwards."""
        sample.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return sample

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
