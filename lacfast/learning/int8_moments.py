"""AdamW whose moments take a byte each, for weights that are trained on a small GPU.

Block-wise dynamic quantisation (arXiv 2110.02861, sections 2.1 and 2.2): 256 elements share a scale, their
largest magnitude, and a code is one of 256 numbers that lie denser towards 0. Of the second moment it is the
square root that is stored, which a step divides by: it has half as many decades, and what is not 0 is never
stored as 0, for a step would divide by eps then.

A step computes in float32 and rounds what it keeps, so the first is AdamW's. As torch's fused AdamW it reads
`found_inf` on the device and changes nothing where that is 1; the host waits for nothing, a graph holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

BLOCK = 256
"""Elements that share a scale."""
SMALLEST = 4096
"""Elements of a weight from which on its moments are quantised; biases and norms keep float32."""
AT_ONCE = 1 << 22
"""Elements that a step has in float32 at once."""
_SCALED = ("exp_avg", "exp_avg_sq")


class CodeBook(NamedTuple):
    """The numbers that codes stand for, in ascending order, and the middles between two of them."""

    values: Tensor
    """(256,) float32."""
    middles: Tensor
    """(255,)"""

    @staticmethod
    def dynamic(*, signed: bool, device: torch.device) -> CodeBook:
        """0, 1, and in each decade below 1 twice as many numbers as in the one before it, evenly."""
        decades = 7
        values = [0.0, 1.0]
        for decade in range(decades):
            count = 2**decade * (1 if signed else 2)
            edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
            found = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade + 1 - decades)).tolist()
            values += [sign * each for each in found for sign in ((1, -1) if signed else (1,))]
        ordered = torch.tensor(sorted(values), dtype=torch.float64)
        middles = (ordered[:-1] + ordered[1:]) / 2
        return CodeBook(ordered.float().to(device), middles.float().to(device))

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """(B, 256) float32 of codes (B, 256) and scales (B, 1)."""
        return self.values[codes.int()] * scales

    def encode(self, blocks: Tensor, *, keeps_positive: bool) -> tuple[Tensor, Tensor]:
        """Codes (B, 256) uint8 and scales (B, 1) of float32 blocks.

        Args:
            blocks: (B, 256)
            keeps_positive: what is above 0 gets the smallest code above 0 rather than 0's.
        """
        scales = blocks.abs().amax(dim=1, keepdim=True)
        shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)
        codes = torch.bucketize(shares, self.middles, out_int32=True)
        if keeps_positive:
            codes = torch.where(blocks > 0, codes.clamp(min=1), codes)
        return codes.to(torch.uint8), scales


class Int8AdamW(Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) with moments in a byte each."""

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float,
    ) -> None:
        """Arguments as torch.optim.AdamW's; `parameters` may be groups with rates of their own."""
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._books: dict[torch.device, tuple[CodeBook, CodeBook]] = {}
        """Signed and unsigned, by device; made before a graph is captured."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step by the gradients that are there."""
        assert closure is None, "a closure would be evaluated between gradient and guard"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_first_state(parameter))
                self._step(parameter, state, group)

    def _step(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        found_inf = getattr(self, "found_inf", None)
        is_off = torch.zeros_like(state["step"], dtype=torch.bool) if found_inf is None else found_inf.bool()
        count = state["step"] + 1
        state["step"].copy_(torch.where(is_off, state["step"], count))
        flat, gradient = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
        for start in range(0, flat.numel(), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            moments = self._moments(parameter, state, part)
            first, second = (moment.float for moment in moments)
            beta1, beta2 = group["betas"]
            now = gradient[part].float()
            first = first.lerp(now, 1 - beta1)
            second = (second * beta2).addcmul_(now, now, value=1 - beta2)
            scaled = second.sqrt() / (1 - beta2**count).sqrt() + group["eps"]
            decayed = flat[part] * (1 - group["lr"] * group["weight_decay"])
            moved = decayed - group["lr"] * (first / (1 - beta1**count)) / scaled
            flat[part].copy_(torch.where(is_off, flat[part], moved))
            for moment, new in zip(moments, (first, second), strict=True):
                moment.write(new, is_off)

    def _moments(self, parameter: Tensor, state: dict[str, Tensor], part: slice) -> list[_Moment]:
        if not is_quantized(parameter):
            return [_Float(state[name].view(-1)[part]) for name in _SCALED]
        if parameter.device not in self._books:
            device = parameter.device
            signed, unsigned = (CodeBook.dynamic(signed=each, device=device) for each in (True, False))
            self._books[device] = signed, unsigned
        rows = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        books = zip(_SCALED, self._books[parameter.device], (False, True), strict=True)
        return [
            _Coded(state[name].view(-1)[part], state[f"{name}_scale"][rows], book, is_root=is_root)
            for name, book, is_root in books
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state as torch's does, which would cast codes to the parameter's dtype."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, like in _first_state(parameter, device="meta").items():
                state[name] = state[name].to(device=parameter.device, dtype=like.dtype)


class _Float:
    """A part of a moment in float32."""

    def __init__(self, stored: Tensor) -> None:
        self.float = stored

    def write(self, new: Tensor, is_off: Tensor) -> None:
        self.float.copy_(torch.where(is_off, self.float, new))


class _Coded:
    """A part of a moment in codes; `is_root`: of its square root."""

    def __init__(self, codes: Tensor, scales: Tensor, book: CodeBook, *, is_root: bool) -> None:
        self.codes, self.scales, self.book, self.is_root = codes, scales, book, is_root
        decoded = book.decode(_blocks(codes), scales).view(-1)[: codes.numel()]
        self.float = decoded.square() if is_root else decoded

    def write(self, new: Tensor, is_off: Tensor) -> None:
        blocks = _blocks(new.sqrt() if self.is_root else new)
        codes, scales = self.book.encode(blocks, keeps_positive=self.is_root)
        self.codes.copy_(torch.where(is_off, self.codes, codes.view(-1)[: self.codes.numel()]))
        self.scales.copy_(torch.where(is_off, self.scales, scales))


_Moment = _Float | _Coded


def is_quantized(parameter: Tensor) -> bool:
    """Whether its moments are."""
    return parameter.numel() >= SMALLEST


def moment_bytes(parameter: Tensor) -> int:
    """Bytes of both moments."""
    made = _first_state(parameter, device="meta")
    return sum(tensor.nbytes for name, tensor in made.items() if name != "step")


def _first_state(parameter: Tensor, *, device: str | torch.device | None = None) -> dict[str, Tensor]:
    place = parameter.device if device is None else device
    state = {"step": torch.zeros((), dtype=torch.float32, device=place)}
    for name in _SCALED:
        if not is_quantized(parameter):
            state[name] = torch.zeros_like(parameter, dtype=torch.float32, device=place)
            continue
        blocks = -(-parameter.numel() // BLOCK)
        # Of scale 0 any code is 0.
        state[name] = torch.zeros(parameter.shape, dtype=torch.uint8, device=place)
        state[f"{name}_scale"] = torch.zeros(blocks, 1, dtype=torch.float32, device=place)
    return state


def _blocks(flat: Tensor) -> Tensor:
    """(B, 256), the last one filled up with 0."""
    return nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
