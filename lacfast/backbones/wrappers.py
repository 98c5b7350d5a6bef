"""Wrappers around a pipeline's modules: what compilation, parallelism, offloading and quantisation do.

Weights are trained in place and written by the names that diffusers gives them, so the trained model has to
be the module itself. A text encoder or a VAE that is compiled is only called, and stays compiled.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

QUANTIZERS = ("torchao", "bitsandbytes", "optimum.quanto", "diffusers.quantizers")
"""Modules whose classes hold quantised weights; theirs may say that they are floats."""


def require_plain_model(model: Any, name: str) -> None:
    """
    Args:
        model: that would be trained.
        name: how the user calls it, "pipeline.unet".

    Raises:
        ValueError: when it is compiled, parallel, offloaded, quantised or on several devices.
    """
    if isinstance(model, OptimizedModule):
        raise ValueError(
            f"{name} is wrapped by torch.compile, and its weights would be saved by other names; pass "
            f"{name}._orig_mod in its place and let the trainer compile it: TrainConfig(compile=True)"
        )
    require_not_parallel(model, name)
    require_not_moved(model, name)
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(
            f"{name} or its blocks were compiled in place, by compile() or compile_repeated_blocks(), before "
            "there is a LoRA; load the pipeline anew and let the trainer compile: TrainConfig(compile=True)"
        )
    kinds = {_kind(parameter) for parameter in model.parameters()} - {""}
    if kinds:
        raise ValueError(
            f"{name} holds quantised weights ({', '.join(sorted(kinds))}), which nothing is trained on here; "
            "load the pipeline without quantization_config, in bfloat16. base_precision='int8' keeps a "
            "LoRA's base in a byte per weight, TrainConfig(rollout_precision='fp8') samples with quantised "
            "weights and trains the others"
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"{name} lies on {' and '.join(devices)}; load the pipeline without device_map, so that the "
            "model is whole, and give load_backbone the device"
        )


def _kind(parameter: nn.Parameter) -> str:
    """How a weight is quantised: its class, or its dtype where scales lie elsewhere. Empty: not at all."""
    for tensor in (parameter, parameter.data):
        if type(tensor).__module__.startswith(QUANTIZERS):
            return type(tensor).__name__
    return "" if parameter.is_floating_point() and parameter.itemsize > 1 else str(parameter.dtype)


def require_not_moved(part: nn.Module, name: str) -> None:
    """
    Raises:
        ValueError: for a part whose weights hooks move or cast at every call.
    """
    for module in part.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            raise ValueError(
                f"{name} is offloaded by accelerate's {type(hook).__name__}, which moves its weights at "
                "every call; call pipeline.remove_all_hooks(), or load the pipeline without device_map. "
                "backbone.free_text_encoders() keeps the text encoders off the device"
            )
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.hooks:
            raise ValueError(
                f"{name} has diffusers' hooks ({', '.join(registry.hooks)}), which move or cast weights, or "
                "keep outputs, at every call; load the pipeline anew without group offloading, layerwise "
                "casting and caches"
            )


def require_not_parallel(module: Any, name: str) -> None:
    """
    Raises:
        ValueError: for a module that is distributed over devices.
    """
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        raise ValueError(
            f"{name} is wrapped in {type(module).__name__}; pass {name}.module in its place: "
            "the trainer averages gradients over the ranks of torch.distributed itself"
        )
    if isinstance(module, (FullyShardedDataParallel, FSDPModule)):
        raise ValueError(
            f"{name} is sharded by FSDP, and no rank has its weights; load the pipeline anew and leave it "
            "whole: every rank trains the same weights, and a LoRA keeps gradients and moments small"
        )


def require_plain_parts(parts: dict[str, Any], trained: str) -> None:
    """The checks over a pipeline's components, of which `trained` is the model."""
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            require_not_parallel(part, f"pipeline.{name}")
            require_not_moved(part, f"pipeline.{name}")
    require_plain_model(parts[trained], f"pipeline.{trained}")
