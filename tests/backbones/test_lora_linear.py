"""The fast LoRA layer gives what peft's gives, keeps no more, and leaves to peft what it does not cover."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from tiny_pipelines import backbone_of, tiny_pipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lacfast.backbones import lora as adapters
from lacfast.backbones.lora_linear import DENSE_GRADIENT_SIZE, LoRALinear
from lacfast.config import LoRAConfig
from lacfast.runs.costs import counted

SMALL, LARGE = (24, 40), (200, 232)
"""(in, out) below and above DENSE_GRADIENT_SIZE."""
ROWS = (3, 5)


class Projection(nn.Module):
    """What peft can adapt: one Linear layer in a module."""

    def __init__(self, sizes: tuple[int, int], *, bias: bool = True) -> None:
        super().__init__()
        self.to_q: Any = nn.Linear(*sizes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.to_q(x)
        return output


def layers(
    sizes: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    **settings: Any,
) -> tuple[Any, Any]:
    """(ours, peft's) on equal weights, adapters in float32 or float64; the layer in `dtype`."""
    torch.manual_seed(0)
    model = Projection(sizes, bias=bias).to(dtype)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False, **settings)
    inject_adapter_in_model(config, model, adapter_name="policy")
    theirs = model.to_q
    if dtype == torch.bfloat16:
        adapters._keep_float32(theirs, "policy")
    ours = copy.deepcopy(theirs)
    LoRALinear.install(ours)
    assert type(ours) is LoRALinear
    assert type(theirs) is PeftLinear
    return ours, theirs


def results(layer: Any, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of a weighted sum."""
    x = x.clone().requires_grad_(True)
    output = layer(x)
    (output * weight).sum().backward()
    assert x.grad is not None
    found = {"output": output, "x": x.grad}
    return found | {name: value.grad for name, value in layer.named_parameters() if value.grad is not None}


def inputs(sizes: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randn((*ROWS, size), generator=generator, dtype=torch.float64) for size in sizes)
    x, weight = (tensor.to(dtype) for tensor in drawn)
    return x, weight


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
def test_output_and_all_gradients_equal_peft_s_in_float64(
    sizes: tuple[int, int], bias: bool, use_rslora: bool
) -> None:
    assert (sizes[0] * sizes[1] > DENSE_GRADIENT_SIZE) == (sizes is LARGE)
    ours, theirs = layers(sizes, torch.float64, bias=bias, use_rslora=use_rslora)
    x, weight = inputs(sizes, torch.float64)
    own, expected = results(ours, x, weight), results(theirs, x, weight)
    assert own.keys() == expected.keys()
    assert {"lora_A.policy.weight", "lora_B.policy.weight"} < own.keys()
    for name in own:
        torch.testing.assert_close(own[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
def test_bfloat16_is_at_least_as_near_to_the_exact_result_as_peft_s(sizes: tuple[int, int]) -> None:
    ours, theirs = layers(sizes, torch.bfloat16)
    x, weight = inputs(sizes, torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    expected = results(exact, x.double(), weight.double())
    own, peft = results(ours, x, weight), results(theirs, x, weight)
    for name in expected:
        assert own[name].dtype == peft[name].dtype
        mine, other = ((found[name].double() - expected[name]).norm() for found in (own, peft))
        # Half of a bfloat16's last place, as two roundings in another order may cost.
        assert mine <= other + 2**-9 * expected[name].norm(), name


def test_a_small_adapter_is_not_rounded_away_in_bfloat16() -> None:
    """W + s B A in 16 bits would be W here, whose own output cancels."""
    ours, theirs = layers(SMALL, torch.bfloat16)
    x = torch.zeros(SMALL[0], dtype=torch.bfloat16)
    x[0], x[1] = 1.0, -1.0
    with torch.no_grad():
        for layer in (ours, theirs):
            layer.base_layer.weight.fill_(1.0)
            layer.base_layer.bias.zero_()
            layer.lora_A["policy"].weight.zero_()[:, 0] = 1e-3
            layer.lora_B["policy"].weight.fill_(1e-1)
        assert float(ours(x).min()) > 0
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_requires_a_gradient_gets_one(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    ours, theirs = layers(sizes, dtype)
    x, _ = inputs(sizes, dtype)
    for frozen in ("lora_A", "lora_B"):
        for layer in (ours, theirs):
            layer.zero_grad(set_to_none=True)
            layer.lora_A.requires_grad_(frozen != "lora_A")
            layer.lora_B.requires_grad_(frozen != "lora_B")
            layer(x).square().sum().backward()
        own, expected = (
            {name: value.grad for name, value in layer.named_parameters() if value.grad is not None}
            for layer in (ours, theirs)
        )
        assert own.keys() == expected.keys()
        assert len(own) == 1


ASIDE: dict[str, Callable[[Any], object]] = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "two active": lambda layer: layer.set_adapter(["policy", "second"]),
    "not here": lambda layer: setattr(layer, "_active_adapter", ["elsewhere"]),
    "trained base": lambda layer: layer.base_layer.requires_grad_(True),
    "hooked base": lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
    "transposed base": lambda layer: setattr(layer, "fan_in_fan_out", True),
    "other base": lambda layer: setattr(layer.base_layer, "__class__", OtherLinear),
}


class OtherLinear(nn.Linear):
    """Stands for a subclass that computes in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("case", ASIDE)
def test_it_steps_aside_for_other_states(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = layers(SMALL)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False)
    for layer in (ours, theirs):
        torch.manual_seed(2)
        layer.update_layer("second", r=2, lora_alpha=2, config=config)
        layer.set_adapter("policy")
        ASIDE[case](layer)
    assert_peft_runs(ours, theirs, monkeypatch)


VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.5},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("case", VARIANTS)
def test_it_steps_aside_for_other_adapters(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_peft_runs(*layers(SMALL, **VARIANTS[case]), monkeypatch)


def assert_peft_runs(ours: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = inputs(SMALL, torch.float32)
    calls = []
    forward = PeftLinear.forward
    monkeypatch.setattr(
        PeftLinear,
        "forward",
        lambda self, *args, **kwargs: calls.append(self) or forward(self, *args, **kwargs),
    )
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(3)
    assert torch.equal(ours(x), expected)
    assert calls == [theirs, ours]


def test_it_steps_aside_for_mixed_dtypes_and_per_sample_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = layers(SMALL)
    x, _ = inputs(SMALL, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
        assert ours(x).dtype == torch.bfloat16
    names = ["policy", "__base__", "policy"]
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x, adapter_names=names), theirs(x, adapter_names=names))
    # peft alone would run float32 adapters of a 16-bit layer in float32.
    for layer in (ours, theirs):
        layer.base_layer.bfloat16()
    x = x.bfloat16()
    assert torch.equal(ours(x), theirs(x))
    weight = nn.Parameter(torch.zeros(SMALL[::-1]).as_subclass(type("Quantised", (Tensor,), {})), False)
    ours.base_layer.weight = weight
    assert type(weight) is not nn.Parameter
    assert ours._covered(torch.zeros(SMALL[0])) is None


def test_other_kinds_of_layers_keep_their_class() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3)})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv"]), model)
    before = type(model["conv"])
    LoRALinear.install(model["conv"])
    assert type(model["conv"]) is before


@pytest.mark.parametrize(("sizes", "dtype"), [(SMALL, torch.float32), (LARGE, torch.bfloat16)])
def test_it_dispatches_fewer_kernels_and_keeps_less_than_peft(
    sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    forward, both, saved = [], [], []
    for layer in layers(sizes, dtype):
        layer.to("meta")
        x = torch.empty((64, sizes[0]), device="meta", dtype=dtype, requires_grad=True)
        with torch.no_grad():
            forward.append(counted(lambda layer=layer, x=x: layer(x)))
        both.append(counted(lambda layer=layer, x=x: layer(x).sum().backward()))
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            layer(x)
        saved.append(sum(kept))
    assert forward[0].kernels <= forward[1].kernels - 2
    assert both[0].kernels < both[1].kernels
    assert forward[0].syncs == both[0].syncs == 0
    if dtype == torch.bfloat16:
        # The same products: torch counts those that accumulate too.
        assert forward[0].flops == forward[1].flops
        assert both[0].flops == both[1].flops
    else:
        assert forward[0].flops < forward[1].flops
    assert saved[0] <= saved[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_without_a_graph_break_and_is_recomputed_by_checkpointing(dtype: torch.dtype) -> None:
    for sizes in (SMALL, LARGE):
        ours, _ = layers(sizes, dtype)
        x, weight = inputs(sizes, dtype)
        eager = results(ours, x, weight)
        ours.zero_grad()
        compiled = results(torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True), x, weight)
        compiled = {name.removeprefix("_orig_mod."): value for name, value in compiled.items()}
        assert eager.keys() == compiled.keys()
        ours.zero_grad()
        x = x.clone().requires_grad_(True)
        (checkpoint(ours, x, use_reentrant=False) * weight).sum().backward()
        assert torch.equal(x.grad, eager["x"])
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value)


def test_it_runs_on_fake_tensors_without_a_host_sync() -> None:
    for sizes in (SMALL, LARGE):
        ours, _ = layers(sizes)
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty((2, 3, sizes[0]), requires_grad=True)
            ours(x).sum().backward()
            assert x.grad is not None
            assert x.grad.shape == x.shape


def test_a_policy_s_layers_are_fast_and_their_adapters_load_in_plain_diffusers(tmp_path: Path) -> None:
    backbone = backbone_of(tiny_pipeline("sd15"), lora=LoRAConfig(rank=4, alpha=8))
    with torch.no_grad():
        for parameter in backbone.policy_parameters():
            parameter.add_(0.05)
    tuned = adapters.tuner_layers(backbone.model)
    assert {type(layer) for layer in tuned.values()} == {LoRALinear}
    assert type(next(iter(adapters.tuner_layers(copy.deepcopy(backbone.model)).values()))) is LoRALinear
    backbone.save_pretrained(tmp_path)
    plain: Any = tiny_pipeline("sd15")
    plain.load_lora_weights(tmp_path)
    assert isinstance(plain.unet, UNet2DConditionModel)
    assert {type(layer) for layer in adapters.tuner_layers(plain.unet).values()} == {PeftLinear}
    generator = torch.Generator().manual_seed(4)
    sample = torch.randn((2, *backbone.latent_shape), generator=generator)
    conditioning = backbone.encode_unconditional(2)
    timestep = torch.tensor([500.0, 20.0])
    with torch.no_grad():
        expected = plain.unet(sample, timestep, **conditioning.tensors, return_dict=False)[0]
        torch.testing.assert_close(backbone.predict(sample, timestep, conditioning), expected)
