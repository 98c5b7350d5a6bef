"""cfg_grad="cond" has the gradients of the peers' cat-and-detach without the second half's backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_pipelines import FAMILIES, PROMPTS, backbone_of, tiny_pipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lacfast import LoRAConfig, ops
from lacfast.backbones.latent import LatentBackbone
from lacfast.policy import policy_output
from lacfast.records import Conditioning
from lacfast.schedule import flow_sde, uniform_sigmas

BATCH = 4
SCALE = 4.0
LORA = LoRAConfig(rank=4)


class State:
    """One minibatch of an update in the dtype of the latents."""

    def __init__(self, backbone: LatentBackbone, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (BATCH, *backbone.latent_shape)
        self.backbone = backbone
        self.sample, self.old_output, self.noise = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)
        )
        self.timestep = torch.tensor([900.0, 700.0, 500.0, 300.0])
        self.cond = backbone.encode_prompts(PROMPTS[:BATCH])
        self.uncond = backbone.encode_unconditional(BATCH)

    def loss(self, cond_output: Tensor, uncond_output: Tensor) -> Tensor:
        guided = uncond_output + SCALE * (cond_output - uncond_output)
        loss, _ = ops.ppo_loss(
            guided.contiguous(),
            self.old_output,
            torch.linspace(-1, 1, BATCH, dtype=guided.dtype),
            flow_sde(uniform_sigmas(5), 0.7).coefficients(dtype=guided.dtype),
            torch.arange(BATCH),
            noise=self.noise,
            clip_range=1e6,
        )
        return loss

    def ours(self, cfg_grad: str) -> Tensor:
        forward = policy_output(
            self.backbone, self.sample, self.timestep, self.cond, self.uncond, cfg_grad=cfg_grad
        )
        assert forward.uncond_output is not None
        return self.loss(forward.output, forward.uncond_output)

    def peers(self, *, detach: bool) -> Tensor:
        """One forward of both halves, as flow_grpo (detach) and DDPO have it."""
        both = {
            name: torch.cat([self.uncond.tensors[name], tensor]) for name, tensor in self.cond.tensors.items()
        }
        output = self.backbone.predict(
            torch.cat([self.sample, self.sample]), self.timestep.repeat(2), Conditioning(both)
        )
        uncond_output, cond_output = output.chunk(2)
        return self.loss(cond_output, uncond_output.detach() if detach else uncond_output)


def gradient(backbone: LatentBackbone, loss: Callable[[], Tensor]) -> Tensor:
    parameters = backbone.policy_parameters()
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in gradients])


def in_float64(family: str) -> LatentBackbone:
    backbone = backbone_of(tiny_pipeline(family), lora=LORA, dtype=torch.float64)
    backbone.model.double()
    for parameter in backbone.policy_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return backbone


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("cfg_grad", "detach"), [("cond", True), ("both", False)])
def test_gradients_are_those_of_one_forward_of_both_halves(family: str, cfg_grad: str, detach: bool) -> None:
    state = State(in_float64(family), torch.float64)
    ours = gradient(state.backbone, lambda: state.ours(cfg_grad))
    peers = gradient(state.backbone, lambda: state.peers(detach=detach))
    other = gradient(state.backbone, lambda: state.peers(detach=not detach))
    assert (ours - peers).norm() <= 1e-6 * peers.norm()
    assert (other - peers).norm() > 1e-2 * peers.norm()


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "lora"])
def test_the_half_without_gradient_saves_a_fifth_of_sd3_s_flops(lora: LoRAConfig | None) -> None:
    state = State(backbone_of(tiny_pipeline("sd3"), lora=lora), torch.float32)
    counts = []
    for loss in (lambda: state.ours("cond"), lambda: state.peers(detach=True)):
        with FlopCounterMode(display=False) as counter:
            gradient(state.backbone, loss)
        counts.append(counter.get_total_flops())
    assert counts[0] <= 0.8 * counts[1]
