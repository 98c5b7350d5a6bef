"""LoRA through peft: the policy's and the critic's adapters on one base, float32 weights, no autocast.

An adapter's weights are float32 whatever the base's dtype, and are cast where they are used, so that the
forward runs in the base's dtype and AdamW's small steps are not rounded away.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils.peft_utils import delete_adapter_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lacfast.backbones.int8 import Int8Linear, running_dtype
from lacfast.backbones.lora_linear import LoRALinear
from lacfast.backbones.masters import Casts, MasterLinear, MasterRMSNorm
from lacfast.config import LoRAConfig

POLICY = "policy"
"""Name of the policy's adapter."""
ANCHOR = "anchor"
"""Name of a frozen copy of the policy's adapter as it was before training."""
CRITIC = "critic"
"""Name of the first critic's adapter, for the critic trunk "lora"; others have a number behind it."""

_OWNERS = "lacfast_owners"
"""Attribute of a model: name of a critic's or an anchor's adapter -> whose it is, as long as that lives."""


@dataclass(frozen=True)
class _Adapted:
    """What a model's adapters are made of, found once: a walk over all modules takes milliseconds."""

    configs: dict[str, Any]
    """peft's, by adapter: other objects when an adapter came, went or was replaced."""
    layers: dict[str, Any]
    casts: dict[str, Casts]
    """Each adapter's."""


_ADAPTED: WeakKeyDictionary[nn.Module, _Adapted] = WeakKeyDictionary()


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by module name."""
    return _adapted(model).layers


def require_none(model: Any) -> None:
    """
    Raises:
        ValueError: for a model that comes with adapters.
    """
    if tuner_layers(model):
        raise ValueError(
            f"the {type(model).__name__} already has adapters {list(model.peft_config)}; load the "
            "pipeline anew and say what becomes of them: load_backbone(..., lora=...) trains one on, "
            "load_backbone(..., merged_loras={...}) merges them into the weights"
        )


def _adapted(model: nn.Module) -> _Adapted:
    configs = getattr(model, "peft_config", {})
    known = _ADAPTED.get(model)
    if known is None or not configs or not _are_same(known.configs, configs):
        layers = _found_layers(model)
        casts = {
            name: Casts(
                (projections[name], layer.get_base_layer())
                for layer in layers.values()
                for projections in (layer.lora_A, layer.lora_B)
                if name in projections and isinstance(projections[name], MasterLinear)
            )
            for name in configs
        }
        known = _ADAPTED[model] = _Adapted(dict(configs), layers, casts)
    return known


def _are_same(known: dict[str, Any], configs: dict[str, Any]) -> bool:
    return known.keys() == configs.keys() and all(known[name] is configs[name] for name in configs)


def _found_layers(module: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)}


def _cast_masters(model: nn.Module, args: Any) -> None:
    """Run before a model's forward."""
    casts = _active_casts(model)
    if casts is not None:
        casts.make()


def _drop_casts(model: nn.Module, args: Any, output: Any) -> None:
    """Run after it, also where it ends in an error."""
    for casts in _adapted(model).casts.values():
        if casts.made:
            casts.hand_out([])


def _active_casts(model: nn.Module) -> Casts | None:
    """The casts of the adapter that alone is active."""
    adapted = _adapted(model)
    first = next(iter(adapted.layers.values()), None)
    if first is None or first.disable_adapters or len(first.active_adapters) != 1:
        return None
    return adapted.casts.get(first.active_adapters[0])


def recomputation(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which a part of today's forward can run again later, with the same casts."""
    casts = _active_casts(model)
    return nullcontext() if casts is None else casts.kept()


def add_adapter(
    model: Any, name: str, config: LoRAConfig, default_targets: tuple[str, ...]
) -> list[nn.Parameter]:
    """Add a LoRA that starts as the identity; returns its float32 weights in the order of the modules.

    Args:
        model: a diffusers model; its other weights stay as they are.
        name: POLICY or a critic's; an adapter of that name is replaced.
        config: rank, alpha and modules.
        default_targets: the family's modules, where the config names none.

    Raises:
        ValueError: when no module of the model is named so.
    """
    targets = list(default_targets if config.target_modules is None else config.target_modules)
    if not any(is_target(module_name, targets) for module_name, _ in model.named_modules()):
        raise ValueError(
            f"target_modules={targets} match no module of {type(model).__name__}; "
            f"leave it out for the family's own: {list(default_targets)}"
        )
    if name in getattr(model, "peft_config", {}):
        delete_adapter_layers(model, name)  # type: ignore[no-untyped-call]
        # peft takes the attribute away with the last adapter, and diffusers' models may keep the entry.
        getattr(model, "peft_config", {}).pop(name, None)
    needs_gradient = {parameter: parameter.requires_grad for parameter in model.parameters()}
    alpha: Any = config.rank if config.alpha is None else config.alpha
    settings: Any = LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        target_modules=targets,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft draws on the CPU, and warns of a second adapter, which is what a critic's is.
        torch.default_generator.manual_seed(config.seed)
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        if isinstance(model, PeftAdapterMixin):
            model.add_adapter(settings, adapter_name=name)
        else:
            inject_adapter_in_model(settings, model, adapter_name=name)
    weights = []
    for layer in _found_layers(model).values():
        if name in layer.lora_A:
            weights += _keep_float32(layer, name)
            LoRALinear.install(layer)
    if _cast_masters not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_cast_masters)
        model.register_forward_hook(_drop_casts, always_call=True)
    # peft froze the other weights and the other adapters.
    for parameter, needed in needs_gradient.items():
        parameter.requires_grad_(needed)
    activate(model, POLICY if POLICY in model.peft_config else None)
    return weights


def scale_of(config: LoRAConfig) -> float:
    """What an adapter's change is multiplied by."""
    return 1.0 if config.alpha is None else config.alpha / config.rank


def own_name(model: nn.Module, kind: str, owner: Any) -> str:
    """The name of an adapter that is to be `owner`'s alone: that of an owner which is gone, or a new one.

    Args:
        model: that gets the adapter.
        kind: CRITIC or ANCHOR.
        owner: a trunk or a frozen policy.
    """
    owners: WeakValueDictionary[str, Any] = model.__dict__.setdefault(_OWNERS, WeakValueDictionary())
    names = (f"{kind}_{number}" if number > 1 else kind for number in count(1))
    name = next(name for name in names if name not in owners)
    owners[name] = owner
    return name


def frozen_copy(model: Any, owner: Any, config: LoRAConfig, default_targets: tuple[str, ...]) -> str:
    """Add a frozen adapter with the policy's weights of now; returns its name.

    Args:
        model: that has the policy's adapter.
        owner: whose the copy is.
        config: the policy's adapter's, and
        default_targets: its family's modules.
    """
    name, weights = own_name(model, ANCHOR, owner), adapter_state(model, POLICY)
    for parameter in add_adapter(model, name, config, default_targets):
        parameter.requires_grad_(False)
    with torch.no_grad():
        for own, tensor in adapter_state(model, name).items():
            tensor.copy_(weights[own])
    return name


def is_target(module_name: str, targets: Iterable[str]) -> bool:
    """Whether a module's name has one of these ends."""
    return any(module_name == target or module_name.endswith(f".{target}") for target in targets)


def _keep_float32(layer: Any, name: str) -> list[nn.Parameter]:
    weights = []
    dtype = running_dtype(layer.get_base_layer())
    for projections in (layer.lora_A, layer.lora_B):
        # As peft leaves it where the base's own weights have this dtype.
        projections[name].to(dtype)
        if type(projections[name]) is nn.Linear:
            projections[name] = MasterLinear.wrap(projections[name])
            layer.cast_input_dtype_enabled = False
        else:
            # Convolutions keep peft's own rule: the adapter's path runs in float32.
            projections[name].float()
        weights.append(projections[name].weight)
    return weights


def activate(model: nn.Module, name: str | None) -> None:
    """Make one adapter or none active. peft's own switch would also change what needs a gradient."""
    for layer in tuner_layers(model).values():
        # Past torch's own assignment, which looks for parameters first.
        vars(layer).update(_disable_adapters=name is None, _active_adapter=[] if name is None else [name])


@contextmanager
def activated(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the context one adapter, or none, is active."""
    layers = tuner_layers(model).values()
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    activate(model, name)
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            vars(layer).update(_disable_adapters=disabled, _active_adapter=active)


def signature(model: nn.Module) -> Hashable:
    """The adapters that run and their scales: flags and numbers in Python, which a graph freezes."""
    return frozenset(
        (
            tuple(layer._active_adapter),
            layer._disable_adapters,
            tuple(layer.merged_adapters),
            tuple(sorted(layer.scaling.items())),
        )
        for layer in tuner_layers(model).values()
    )


def adapter_of(parameter_name: str) -> str | None:
    """The adapter that a model's parameter belongs to: "...to_q.lora_A.policy.weight"."""
    parts = parameter_name.split(".")
    return parts[-2] if len(parts) > 2 and parts[-3] in ("lora_A", "lora_B") else None


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's live weights by peft's names without the adapter's: "...to_q.lora_A.weight"."""
    return {
        full_name.replace(f".{name}.", "."): parameter.data
        for full_name, parameter in model.named_parameters()
        if adapter_of(full_name) == name
    }


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The live state dict as if there were no adapter."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if adapter_of(name) is None
    }


def merged_copy(module: nn.Module) -> Any:
    """A trainable float32 copy of a module with the active adapter's change inside its weights."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        if isinstance(part, Int8Linear):
            part.make_plain()
    copied.float()
    for name, layer in _found_layers(copied).items():
        if not layer._disable_adapters:
            layer.merge(adapter_names=layer._active_adapter)
        parent, _, child = name.rpartition(".")
        setattr(copied.get_submodule(parent), child, layer.get_base_layer())
    MasterRMSNorm.install(copied)
    return copied.requires_grad_(True)
