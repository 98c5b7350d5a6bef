"""Ratio, KLs and PPO loss in Triton, forward and backward, against the reference in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from lacfast.kernels.ppo_gradient import log_ratio_backward, ppo_loss_backward
from lacfast.kernels.ppo_loss import log_ratio, ppo_loss
from lacfast.kernels.ppo_rows import BLOCK_R
from torch import Tensor

from lacfast import reference
from lacfast.kernels import launch
from lacfast.ops.ppo_loss import LogRatioOutputs, PPOLoss, PPOLossOutputs
from lacfast.records import NoiseKey

pytestmark = pytest.mark.interpreter

# One element, odd, one program of several blocks, several programs with a ragged last one.
SIZES = [1, 7, 512, 777, 1500, 3001, 5001]
BATCH = 4
CLIP_RANGE = 0.01
KL_WEIGHT = 0.3

# (has_reference, has_key, size, dtype)
CASES = [
    *((flag, flag, size, torch.float32) for size in SIZES for flag in (False, True)),
    *((flag, not flag, 5001, torch.float32) for flag in (False, True)),
    *((flag, flag, 5001 if flag else 7, torch.bfloat16) for flag in (False, True)),
    *((flag, flag, 5001 if flag else 7, torch.float16) for flag in (False, True)),
]


@dataclass(frozen=True)
class Pairs:
    """What the ratio of one minibatch reads; either noise or key is None."""

    model_output: Tensor
    old_model_output: Tensor
    anchor_output: Tensor | None
    coefficients: Tensor
    steps: Tensor
    noise: Tensor | None
    key: tuple[Tensor, Tensor] | None

    def record(self, scale: float | None = None, **of_loss: Tensor | float | None) -> PPOLoss:
        """What the kernels take, without a loss as log_ratio does."""
        return PPOLoss(
            self.model_output,
            self.old_model_output,
            self.anchor_output,
            self.coefficients,
            self.steps,
            self.noise,
            *(self.key or (None, None)),
            1 / self.model_output[0].numel() if scale is None else scale,
            **of_loss,
        )

    def gradient(self, grad_model_output: Tensor) -> PPOLoss:
        """Where the kernels put the gradient."""
        return self.record()._replace(model_output=grad_model_output)

    def select(self, rows: Tensor) -> "Pairs":
        return replace(
            self,
            **{
                name: None if getattr(self, name) is None else getattr(self, name)[rows]
                for name in ("model_output", "old_model_output", "anchor_output", "steps", "noise")
            },
            key=self.key and (self.key[0], self.key[1][rows]),
        )

    def double(self) -> dict[str, Tensor | None]:
        """Arguments of the reference in float64."""
        noise = self.noise
        if noise is None:
            noise = reference.normal_noise(tuple(self.model_output.shape), self.steps, NoiseKey(*self.key))
        return {
            "model_output": self.model_output.double().requires_grad_(),
            "old_model_output": self.old_model_output.double(),
            "coefficients": self.coefficients.double(),
            "steps": self.steps,
            "noise": noise.double(),
            "anchor_output": None if self.anchor_output is None else self.anchor_output.double(),
        }


@pytest.fixture
def make_pairs(
    draw: Callable[..., Tensor], coefficients: Tensor, steps: Tensor, key: tuple[Tensor, Tensor]
) -> Callable[..., Pairs]:
    def make(num_elements: int, dtype: torch.dtype, *, has_reference: bool, has_key: bool) -> Pairs:
        shape = (BATCH, num_elements)
        old = draw(*shape)
        return Pairs(
            (old + 0.1 * draw(*shape)).to(dtype),
            old.to(dtype),
            (old + 0.2 * draw(*shape)).to(dtype) if has_reference else None,
            coefficients,
            steps,
            None if has_key else draw(*shape, dtype=dtype),
            key if has_key else None,
        )

    return make


@pytest.mark.parametrize("op", ["ppo_loss", "ppo_loss_backward"])
def test_sizes_reach_every_default_launch(op: str) -> None:
    rows = [row.shape for row in launch.table(op)["default"]]
    assert {launch.pick_launch(op, size, "default")[:3] for size in SIZES} == set(rows)


@pytest.mark.parametrize(("has_reference", "has_key", "num_elements", "dtype"), CASES)
def test_terms_and_their_gradient_equal_the_reference(
    has_reference: bool,
    has_key: bool,
    num_elements: int,
    dtype: torch.dtype,
    make_pairs: Callable[..., Pairs],
    poisoned: Callable[..., Tensor],
    draw: Callable[..., Tensor],
    storage_tolerance: dict[torch.dtype, float],
) -> None:
    pairs = make_pairs(num_elements, dtype, has_reference=has_reference, has_key=has_key)
    terms = poisoned(BATCH, 3)
    log_ratio(pairs.record(), LogRatioOutputs(terms))
    grad_terms = draw(BATCH, 3) * num_elements
    grad = poisoned(BATCH, num_elements, dtype=dtype)
    grads = LogRatioOutputs(grad_terms)
    log_ratio_backward(pairs.record(), LogRatioOutputs(None), grads, pairs.gradient(grad))

    arguments = pairs.double()
    output = reference.log_ratio(**arguments)
    expected = torch.stack([output.log_ratio, output.kl_old, output.kl_ref], dim=1)
    torch.testing.assert_close(terms.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    (expected * grad_terms.double()).sum().backward()
    expected_grad = arguments["model_output"].grad
    torch.testing.assert_close(grad.double(), expected_grad, rtol=storage_tolerance[dtype], atol=2e-5)
    assert not terms[pairs.steps == 1].any()
    assert not grad[pairs.steps == 1].any()


@pytest.fixture
def launch_loss(poisoned: Callable[..., Tensor]) -> Callable[..., PPOLossOutputs]:
    def fill(
        pairs: Pairs,
        advantages: Tensor,
        *,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        clip_range: float = CLIP_RANGE,
        kl_weight: float = 0.0,
        scale: float | None = None,
    ) -> PPOLossOutputs:
        batch = len(advantages)
        results = PPOLossOutputs(
            poisoned(1), poisoned(batch, 4), poisoned(len(pairs.coefficients), 6), poisoned(batch, 3)
        )
        bounds = {"clip_low": clip_range, "clip_high": clip_range, "kl_weight": kl_weight}
        ppo_loss(pairs.record(scale, advantages=advantages, weights=weights, mask=mask, **bounds), results)
        return results

    return fill


@pytest.mark.parametrize("has_weights", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize(
    ("num_elements", "dtype"), [(7, torch.float32), (600, torch.bfloat16), (5001, torch.float32)]
)
def test_loss_and_its_gradient_equal_the_reference(
    num_elements: int,
    dtype: torch.dtype,
    has_weights: bool,
    make_pairs: Callable[..., Pairs],
    launch_loss: Callable[..., PPOLossOutputs],
    poisoned: Callable[..., Tensor],
    storage_tolerance: dict[torch.dtype, float],
) -> None:
    pairs = make_pairs(num_elements, dtype, has_reference=True, has_key=True)
    arguments = pairs.double()
    # Both signs against both directions of the ratio: active and inactive clips on either side.
    log_ratio = reference.log_ratio(**arguments).log_ratio.detach()
    advantages = torch.tensor([1.5, -0.5, 0.7, 2.0]) * torch.where(log_ratio < 0, -1, 1)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.25]) if has_weights else None
    launched = launch_loss(pairs, advantages, weights=weights, kl_weight=KL_WEIGHT)
    grad = poisoned(BATCH, num_elements, dtype=dtype)
    grad_loss = torch.tensor(float(num_elements))
    grads = PPOLossOutputs(grad_loss, None, None, None)
    ppo_loss_backward(pairs.record(), launched, grads, pairs.gradient(grad))

    loss, stats = reference.ppo_loss(
        **arguments, advantages=advantages, weights=weights, clip_range=CLIP_RANGE, kl_weight=KL_WEIGHT
    )
    torch.testing.assert_close(launched.loss[0].double(), loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(launched.rows.double(), stats.rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(launched.step_sums.double(), stats.step_sums, rtol=1e-5, atol=1e-6)
    (loss * num_elements).backward()
    expected_grad = arguments["model_output"].grad
    torch.testing.assert_close(grad.double(), expected_grad, rtol=storage_tolerance[dtype], atol=1e-5)


@pytest.mark.parametrize("num_elements", [600, 5001])
def test_clip_acts_only_where_the_ratio_moves_with_the_advantage(
    num_elements: int,
    coefficients: Tensor,
    launch_loss: Callable[..., PPOLossOutputs],
    draw: Callable[..., Tensor],
) -> None:
    noise = draw(1, num_elements).expand(BATCH, -1).contiguous()
    old = torch.zeros(BATCH, num_elements)
    # dv along the noise raises the likelihood, against it lowers it: ratio above, above, below, below.
    direction = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]) * coefficients[0, 1].sign()
    pairs = Pairs(
        0.3 * direction * noise, old, None, coefficients, torch.zeros(BATCH, dtype=torch.int64), noise, None
    )
    launched = launch_loss(pairs, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    rows, shares = launched.rows, BATCH * launched.shares
    assert (rows[:2, 0] > CLIP_RANGE).all()
    assert (rows[2:, 0] < -CLIP_RANGE).all()
    assert rows[:, 3].tolist() == [1.0, 0.0, 0.0, -1.0]
    ratio = rows[:, 0].exp()
    torch.testing.assert_close(shares[:, 1], torch.tensor([0.0, ratio[1], -ratio[2], 0.0]))
    torch.testing.assert_close(
        shares[:, 0], torch.tensor([-(1 + CLIP_RANGE), ratio[1], -ratio[2], 1 - CLIP_RANGE])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_elements", [7, 5001])
def test_ratio_is_exactly_one_before_the_first_update(
    num_elements: int,
    dtype: torch.dtype,
    make_pairs: Callable[..., Pairs],
    launch_loss: Callable[..., PPOLossOutputs],
) -> None:
    pairs = make_pairs(num_elements, dtype, has_reference=False, has_key=True)
    pairs = replace(pairs, old_model_output=pairs.model_output.clone())
    advantages = torch.tensor([0.3, -1.7, 0.01, 5.0])
    launched = launch_loss(pairs, advantages, clip_range=1e-5)
    assert not launched.rows.any()
    # Step 1, the third row's, is deterministic. A quarter is exact.
    expected = torch.where(pairs.steps == 1, 0.0, -advantages / 4)
    assert torch.equal(launched.shares[:, :2], expected[:, None].expand(-1, 2))


def test_clip_is_decided_on_digits_below_float32_at_one(
    coefficients: Tensor, launch_loss: Callable[..., PPOLossOutputs]
) -> None:
    # One element with eps = 0 gives log_ratio = -z^2 / 2; next to -1e-5, 1 - rho in float32 moves by 0.6 %.
    target = torch.tensor([0.9990e-5, 0.9999e-5, 1.0001e-5, 1.0010e-5])
    output = ((2 * target).sqrt() * coefficients[0, 2] / coefficients[0, 1])[:, None]
    steps = torch.zeros(BATCH, dtype=torch.int64)
    pairs = Pairs(output, torch.zeros_like(output), None, coefficients, steps, torch.zeros_like(output), None)
    launched = launch_loss(pairs, -torch.ones(BATCH), clip_range=1e-5, scale=1.0)
    assert launched.rows[:, 3].tolist() == [0.0, 0.0, -1.0, -1.0]


def test_totals_of_several_blocks_of_rows(
    coefficients: Tensor, launch_loss: Callable[..., PPOLossOutputs], draw: Callable[..., Tensor]
) -> None:
    batch = 2 * BLOCK_R + 3
    old, noise = draw(batch, 2), draw(batch, 2)
    steps = torch.arange(batch) % 3
    pairs = Pairs(old + 0.1 * draw(batch, 2), old, None, coefficients, steps, noise, None)
    advantages, mask = draw(batch), draw(batch) > 0
    launched = launch_loss(pairs, advantages, mask=mask)
    loss, stats = reference.ppo_loss(
        **pairs.double(), advantages=advantages, mask=mask, clip_range=CLIP_RANGE
    )
    torch.testing.assert_close(launched.loss[0].double(), loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(launched.step_sums.double(), stats.step_sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(launched.shares[:, 0].sum(), launched.loss[0])


@pytest.mark.parametrize("num_elements", [7, 5001])
def test_rows_and_gradients_do_not_depend_on_the_batch(
    num_elements: int,
    make_pairs: Callable[..., Pairs],
    launch_loss: Callable[..., PPOLossOutputs],
    poisoned: Callable[..., Tensor],
    draw: Callable[..., Tensor],
) -> None:
    pairs = make_pairs(num_elements, torch.bfloat16, has_reference=True, has_key=True)
    advantages, grad_terms = draw(BATCH), draw(BATCH, 3)
    rows = torch.tensor([3, 0])
    results = []
    for part, index in ((pairs, torch.arange(BATCH)), (pairs.select(rows), rows)):
        launched = launch_loss(part, advantages[index], kl_weight=KL_WEIGHT)
        grad = poisoned(len(index), num_elements, dtype=torch.bfloat16)
        grads = LogRatioOutputs(grad_terms[index])
        log_ratio_backward(part.record(), LogRatioOutputs(None), grads, part.gradient(grad))
        # Two and four rows: the division by the count is exact.
        results.append((launched.rows, len(index) * launched.shares, grad))
    for together, alone in zip(*results, strict=True):
        assert torch.equal(alone, together[rows])
