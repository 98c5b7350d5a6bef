"""An adapter's weights are cast in one call per forward, and no forward runs on what they were before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from tiny_pipelines import PROMPTS, backbone_of, tiny_pipeline
from torch import Tensor, nn

from lacfast.backbone import build_critic
from lacfast.backbones import lora as adapters
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.masters import MasterLinear, MasterRMSNorm
from lacfast.checkpoint import load_in_place
from lacfast.config import CriticConfig, GraphConfig, LoRAConfig
from lacfast.learning.averaging import WeightAverage
from lacfast.records import Conditioning
from lacfast.runs.costs import OperationCounter, counted
from lacfast.runtime.graph import GraphRunner, StaticStep

LORA = LoRAConfig(rank=4, alpha=8)


def low_precision(family: str = "sd3", *, by_layer: bool = False) -> LatentBackbone:
    """A bfloat16 model with an adapter that does something; `by_layer`: each layer casts its own."""
    backbone = backbone_of(tiny_pipeline(family), lora=LORA, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.policy_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if by_layer:
        backbone.model._forward_pre_hooks.clear()
    return backbone


def state(backbone: LatentBackbone) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn((2, *backbone.latent_shape), generator=generator)
    return sample, torch.tensor([500.0, 20.0]), backbone.encode_prompts(PROMPTS[:2])


def output_and_gradients(backbone: LatentBackbone) -> list[Tensor]:
    parameters = backbone.policy_parameters()
    output = backbone.predict(*state(backbone))
    gradients = torch.autograd.grad(output.square().mean(), parameters)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    return [output.detach(), *gradients]


def num_masters(backbone: LatentBackbone) -> int:
    return sum(isinstance(module, MasterLinear) for module in backbone.model.modules())


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


class Casts(OperationCounter):
    """Counts casts from float32 to bfloat16 of one tensor, and of many at once."""

    def __init__(self) -> None:
        super().__init__()
        self.single = self.together = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.together += func is torch.ops.aten._foreach_copy_.default
        is_cast = func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32
        self.single += bool(is_cast and (kwargs or {}).get("dtype") == torch.bfloat16)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_a_forward_casts_all_masters_in_one_call(family: str) -> None:
    kernels = []
    for by_layer in (True, False):
        backbone = low_precision(family, by_layer=by_layer)
        inputs = state(backbone)
        with torch.no_grad():
            kernels.append(
                counted(lambda backbone=backbone, inputs=inputs: backbone.predict(*inputs)).kernels
            )
    assert num_masters(backbone) >= 16
    assert kernels[0] - kernels[1] == num_masters(backbone) - 1


def by_optimizer(backbone: LatentBackbone) -> None:
    parameters = backbone.policy_parameters()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.01, fused=True).step()


def by_loading(backbone: LatentBackbone) -> None:
    saved = {name: tensor + 0.01 for name, tensor in backbone.policy_state().items()}
    load_in_place(backbone.policy_state(), saved, "test")


def by_assignment(backbone: LatentBackbone) -> None:
    saved = {name: tensor + 0.01 for name, tensor in backbone.model.state_dict().items() if "lora_" in name}
    backbone.model.load_state_dict(saved, strict=False, assign=True)


def by_hand(backbone: LatentBackbone) -> None:
    for parameter in backbone.policy_parameters():
        parameter.data.mul_(1.1)


def by_another_adapter(backbone: LatentBackbone) -> None:
    adapters.add_adapter(backbone.model, adapters.POLICY, LoRAConfig(rank=4, seed=7), backbone.lora_targets)
    for parameter in backbone.policy_parameters():
        parameter.data.add_(0.05)


@pytest.mark.parametrize("change", [by_optimizer, by_loading, by_assignment, by_hand, by_another_adapter])
def test_a_forward_runs_on_the_masters_of_today(change: Callable[[LatentBackbone], None]) -> None:
    ours, theirs = low_precision(), low_precision(by_layer=True)
    before = output_and_gradients(ours)
    assert_equal(before, output_and_gradients(theirs))
    for backbone in (ours, theirs):
        change(backbone)
    theirs.model._forward_pre_hooks.clear()
    after = output_and_gradients(ours)
    assert_equal(after, output_and_gradients(theirs))
    assert not torch.equal(after[0], before[0])


def test_averaged_weights_and_a_switched_adapter_are_cast_for_their_own_forwards() -> None:
    ours, theirs = low_precision(), low_precision(by_layer=True)
    results: list[list[Tensor]] = []
    for backbone in (ours, theirs):
        average = WeightAverage(backbone.policy_state(), decay=0.5)
        by_hand(backbone)
        own = output_and_gradients(backbone)
        with average.applied():
            averaged = output_and_gradients(backbone)
        assert not torch.equal(averaged[0], own[0])
        assert_equal(output_and_gradients(backbone), own)
        adapters.add_adapter(backbone.model, "critic", LORA, backbone.lora_targets)
        if backbone is theirs:
            backbone.model._forward_pre_hooks.clear()
        with torch.no_grad(), adapters.activated(backbone.model, "critic"):
            switched = backbone.predict(*state(backbone))
        anchor = backbone.frozen_anchor().predict(*state(backbone)).detach()
        results.append([*own, *averaged, switched, anchor, *output_and_gradients(backbone)])
    assert_equal(*results)


def test_a_graph_casts_anew_at_every_replay() -> None:
    backbone, theirs = low_precision(), low_precision(by_layer=True)
    inputs, output = state(backbone), torch.zeros(2, *backbone.latent_shape)

    @torch.no_grad()
    def run() -> None:
        output.copy_(backbone.predict(*inputs))

    runner = GraphRunner(GraphConfig(mode="fake", strict=True, warmup_steps=1))
    step = StaticStep("a forward", run, lambda: (output,), dict)
    for _ in range(4):
        runner.run(step)
        with torch.no_grad():
            assert torch.equal(output, theirs.predict(*inputs))
        for moved in (backbone, theirs):
            by_optimizer(moved)
    assert runner.statistics.replays == 3


def test_a_backward_pass_keeps_its_own_casts_and_a_copy_of_the_model_has_others() -> None:
    backbone = low_precision()
    copied = copy.deepcopy(backbone.model)
    expected = output_and_gradients(backbone)
    output = backbone.predict(*state(backbone))
    by_hand(backbone)
    with torch.no_grad():
        backbone.predict(*state(backbone))
    gradients = torch.autograd.grad(output.square().mean(), backbone.policy_parameters())
    assert_equal([output.detach(), *gradients], expected)
    with torch.no_grad():
        inputs = state(backbone)
        assert torch.equal(
            backbone.predict_with(copied, inputs[0].bfloat16(), *inputs[1:]).float(), expected[0]
        )


def test_a_recomputed_block_takes_the_casts_of_its_forward() -> None:
    plain, checkpointed = low_precision(), low_precision()
    checkpointed.enable_gradient_checkpointing()
    assert_equal(output_and_gradients(checkpointed), output_and_gradients(plain))
    output = checkpointed.predict(*state(checkpointed)).square().mean()
    with Casts() as casts:
        torch.autograd.grad(output, checkpointed.policy_parameters())
    # Gradients go the other way; what remains is the model's own.
    with Casts() as expected:
        torch.autograd.grad(plain.predict(*state(plain)).square().mean(), plain.policy_parameters())
    assert casts.together == 0
    assert casts.single <= expected.single
    assert expected.together == 1


def test_casts_are_gone_after_a_forward_and_after_an_error() -> None:
    backbone = low_precision()
    masters = [module for module in backbone.model.modules() if isinstance(module, MasterLinear)]
    seen: list[bool] = []
    last = list(backbone.model.modules())[-1]
    last.register_forward_pre_hook(lambda *_: seen.append(masters[0].cast is not None))
    backbone.predict(*state(backbone))
    assert seen == [True]
    assert all(master.cast is None for master in masters)
    last.register_forward_pre_hook(fail)
    with pytest.raises(OSError, match="in the middle"):
        backbone.predict(*state(backbone))
    assert all(master.cast is None for master in masters)


def fail(*_: Any) -> None:
    raise OSError("in the middle")


def test_switching_an_adapter_and_recording_taps_walk_over_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = low_precision()
    critic = build_critic(backbone, 1, CriticConfig(trunk="branch"))
    assert critic is not None
    own = adapters.tuner_layers(backbone.model)
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "named_modules", lambda *_, **__: pytest.fail("the modules were walked"))
        with adapters.activated(backbone.model, None), critic.record(backbone.model):
            assert all(layer.disable_adapters for layer in own.values())
    assert not any(layer.disable_adapters for layer in own.values())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("by", ["us", "its owner"])
def test_layers_of_an_adapter_that_came_later_are_known(by: str) -> None:
    backbone = low_precision()
    model: Any = backbone.model
    few = set(adapters.tuner_layers(model))
    targets = ["to_q", "proj_out"]
    if by == "us":
        adapters.add_adapter(model, "second", replace(LORA, target_modules=tuple(targets)), ())
    else:
        model.add_adapter(PeftConfig(r=2, target_modules=targets), adapter_name="second")
    assert set(adapters.tuner_layers(model)) > few


def test_a_norm_with_a_float32_weight_is_computed_in_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.RMSNorm(16)
    with torch.no_grad():
        norm.weight.add_(0.1 * torch.randn(16))
    inputs = torch.randn(8, 16).bfloat16()
    expected, own, seen = norm(inputs), nn.functional.rms_norm, []

    def rms_norm(hidden_states: Tensor, *args: Any) -> Tensor:
        seen.append((hidden_states.dtype, args[1].dtype))
        return own(hidden_states, *args)

    monkeypatch.setattr(nn.functional, "rms_norm", rms_norm)
    MasterRMSNorm.install(norm)
    found = norm(inputs)
    # Of two dtypes torch has no fused kernel.
    assert seen == [(torch.float32, torch.float32)]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None], ids=["branch", "all weights"])
def test_flux_s_trained_norms_are_of_that_kind(lora: LoRAConfig | None) -> None:
    backbone = backbone_of(tiny_pipeline("flux"), lora=lora, dtype=torch.bfloat16)
    trained = backbone.branch_trunk(1) if lora is not None else backbone.model
    norms = [part for part in trained.modules() if isinstance(part, nn.RMSNorm)]
    assert norms
    assert {type(norm) for norm in norms} == {MasterRMSNorm}
