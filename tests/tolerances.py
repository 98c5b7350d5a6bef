"""How close is close: per dtype of what is stored, and for sums and steps whose order may differ."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    relative: float
    absolute: float


# Against a float64 reference of the same stored inputs: maths in float32 (float64), one rounding at the end.
TOLERANCES = {
    # A few roundings of 6e-8 each, and sums of thousands of terms with block-wise float32 accumulation.
    torch.float32: Tolerance(2e-5, 2e-6),
    # One rounding to 8 bits of mantissa: 2^-9 of the value, 2^-8 where it falls the other way.
    torch.bfloat16: Tolerance(2**-8, 2**-10),
    # One rounding to 11 bits, and subnormals below 6e-5.
    torch.float16: Tolerance(2**-10, 2**-13),
    # Order of summation only.
    torch.float64: Tolerance(1e-11, 1e-12),
}

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if IS_INTERPRETED:
    # Triton's interpreter truncates bfloat16 stores; the GPU rounds to nearest.
    TOLERANCES[torch.bfloat16] = Tolerance(2**-7, 2**-9)

STORAGE_DTYPES = tuple(TOLERANCES)


# Of the size of the terms. Another batch size or another CPU takes another kernel for a product of matrices,
# which adds the same float32 terms, each rounded by 6e-8, in another order; layers and steps carry it on.
REORDERED = 1e-5


def assert_same_sum(actual: Tensor | float, expected: Tensor | float, *, unit: Tensor | float) -> None:
    """Two sums of the same terms in another order: within `REORDERED` of `unit`, the size of what is added.

    Digits relative to the sum itself mean nothing where terms cancel: a policy loss of 2e-5 is a mean of
    normalised advantages, so its unit is 1, their size. That of a cosine or a value is what it ranges over.
    """
    difference = float((torch.as_tensor(actual).double() - torch.as_tensor(expected).double()).abs().max())
    assert difference <= REORDERED * unit, f"{difference:.2e} apart, of terms of size {float(unit):.2e}"


def assert_same_step(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> None:
    """Weights after the same optimizer steps from `before`: near in units of how far each tensor moved.

    Relative to the weights a step of 1e-4 is all rounding. Looser than a sum, since AdamW divides a gradient
    by its own size and gives the rounding of one near 0 the length of a whole step: set adam_eps above it.
    The critic's cannot be set, so its weights (`critic.*`) may differ by a tenth of what they moved.
    """
    assert actual.keys() == expected.keys() <= before.keys()
    assert any(not torch.equal(weight, before[name]) for name, weight in expected.items()), "nothing moved"
    for name, weight in expected.items():
        relative = 0.1 if name.startswith("critic.") else 1e-3
        moved = float((weight.double() - before[name].double()).norm())
        stored = torch.finfo(torch.float32).eps * float(weight.double().norm())
        apart = float((actual[name].double() - weight.double()).norm())
        assert apart <= relative * moved + stored, f"{name}: {apart:.2e} apart, moved by {moved:.2e}"
