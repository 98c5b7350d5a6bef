"""The public ops on the Triton backend and on C++: same noise, same step, same loss, same gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lacfast import ops
from lacfast.records import NoiseKey

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        ops.available()["cpu"] != "usable", reason=f"no C++ backend: {ops.available()['cpu']}"
    ),
]

SHAPE = (4, 3, 7, 8)
BACKENDS = ("triton", "cpu")


@pytest.fixture
def noise_key(key: tuple[Tensor, Tensor]) -> NoiseKey:
    return NoiseKey(*key)


def test_normals_agree(steps: Tensor, noise_key: NoiseKey) -> None:
    drawn = []
    for name in BACKENDS:
        with ops.backend(name):
            drawn.append(ops.normal_noise((4, 5001), steps, noise_key))
    # A wrong word would give another normal altogether; only the polynomials of the two may differ.
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-5)


def test_noise_is_bit_identical_in_sampling_and_scoring(steps: Tensor, noise_key: NoiseKey) -> None:
    pure_noise = torch.tensor([[0.0, 1.0, 1.0]]).expand(4, 3).contiguous()
    zeros = torch.zeros(SHAPE)
    model_output = zeros.clone().requires_grad_()
    with ops.backend("triton"):
        eps = ops.normal_noise(SHAPE, steps, noise_key)
        sampled = ops.gaussian_step(zeros, zeros, pure_noise, steps, noise=noise_key).prev_sample
        # The gradient of log_ratio at v = v_old is eps b / std.
        terms = ops.log_ratio(model_output, zeros, pure_noise, steps, noise=noise_key, reduction="sum")
        terms.log_ratio.sum().backward()
    assert torch.equal(sampled, eps)
    assert torch.equal(model_output.grad, eps)


def test_guided_steps_agree(
    draw: Callable[..., Tensor], coefficients: Tensor, steps: Tensor, noise_key: NoiseKey
) -> None:
    sample, cond, uncond = draw(*SHAPE), draw(*SHAPE), draw(*SHAPE)
    outputs = []
    for name in BACKENDS:
        with ops.backend(name):
            outputs.append(
                ops.gaussian_step(
                    sample, cond, coefficients, steps,
                    noise=noise_key, uncond_output=uncond, guidance_scale=torch.tensor([4.5]),
                )
            )  # fmt: skip
    for field in ("prev_sample", "log_prob", "model_output"):
        torch.testing.assert_close(*(getattr(output, field) for output in outputs), rtol=1e-5, atol=1e-5)


def test_losses_and_gradients_agree(
    draw: Callable[..., Tensor], coefficients: Tensor, steps: Tensor, noise_key: NoiseKey
) -> None:
    old, shift, anchor_output = draw(*SHAPE), draw(*SHAPE), draw(*SHAPE)
    advantages, weights = draw(4), torch.tensor([1.0, 0.5, 2.0, 1.5])
    results = []
    for name in BACKENDS:
        model_output = (old + 0.05 * shift).requires_grad_()
        with ops.backend(name):
            loss, stats = ops.ppo_loss(
                model_output, old, advantages, coefficients, steps, noise=noise_key, clip_range=0.01,
                weights=weights, anchor_output=anchor_output, kl_weight=0.1,
            )  # fmt: skip
            loss.backward()
        results.append((loss.detach(), stats, model_output.grad))
    (loss, stats, grad), (loss_cpu, stats_cpu, grad_cpu) = results
    torch.testing.assert_close(loss, loss_cpu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, grad_cpu, rtol=1e-5, atol=1e-7)
    for field in ("log_ratio", "kl_old", "kl_ref", "clipped"):
        torch.testing.assert_close(getattr(stats, field), getattr(stats_cpu, field), rtol=1e-5, atol=1e-7)
