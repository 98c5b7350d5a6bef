"""Wrappers around a pipeline's modules: what torch.compile, data parallelism and offloading put there.

Weights are trained in place and written by the names that diffusers gives them, so the trained model has to
be the module itself. A text encoder or a VAE that is compiled is only called, and stays compiled.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel


def require_plain_model(model: Any, name: str) -> None:
    """
    Args:
        model: that would be trained.
        name: how the user calls it, "pipeline.unet".

    Raises:
        ValueError: when it is compiled, parallel or offloaded.
    """
    if isinstance(model, OptimizedModule):
        raise ValueError(
            f"{name} is wrapped by torch.compile, and its weights would be saved by other names; pass "
            f"{name}._orig_mod in its place and let the trainer compile it: TrainConfig(compile=True)"
        )
    require_not_parallel(model, name)
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        raise ValueError(
            f"{name} is offloaded by accelerate's {type(hook).__name__}, which moves its weights at "
            "every call; call pipeline.remove_all_hooks(), or load the pipeline without device_map"
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
    """The two checks over a pipeline's components, of which `trained` is the model."""
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            require_not_parallel(part, f"pipeline.{name}")
    require_plain_model(parts[trained], f"pipeline.{trained}")
