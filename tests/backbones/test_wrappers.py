"""A wrapped model is refused before anything is changed; parts that are only called may be compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from refusals import Refusal
from safetensors.torch import load_file
from tiny_pipelines import PROMPTS, backbone_of, load_pipeline, ode_images, tiny_pipeline
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lacfast import LoRAConfig
from lacfast.backbones import adapt
from lacfast.checkpoint import save_backbone

LORA = LoRAConfig(rank=2)


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A process group of this process alone."""
    rendezvous = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def offloaded(module: Any) -> Any:
    return add_hook_to_module(module, ModelHook())


def compiled_in_place(module: Any) -> Any:
    module.mid_block.compile(backend="eager")
    return module


def offloaded_inside(module: Any) -> Any:
    add_hook_to_module(module.mid_block, ModelHook())
    return module


def cast_by_layers(module: Any) -> Any:
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return module


def quantised(module: Any) -> Any:
    """Weights as bitsandbytes packs them: bytes of another shape."""
    layer = module.mid_block.resnets[0].time_emb_proj
    layer.weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    return module


def in_another_tensor(module: Any) -> Any:
    """As torchao's tensors, which say that they are floats."""

    class Quantised(torch.Tensor):
        __module__ = "torchao.quantization"

    layer = module.mid_block.resnets[0].time_emb_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)
    return module


def on_two_devices(module: Any) -> Any:
    module.mid_block.to("meta")
    return module


def sharded(module: Any) -> Any:
    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize(
    ("wrap", "refusal"),
    [
        (
            compiled,
            Refusal(
                "pipeline.unet is wrapped by torch.compile",
                cause="The pipeline's model was replaced by torch.compile(model).",
                remedy="pass pipeline.unet._orig_mod in its place and let the trainer compile it",
            ),
        ),
        (
            DataParallel,
            Refusal(
                "pipeline.unet is wrapped in DataParallel",
                cause="The pipeline's model was replaced by a data-parallel wrapper of torch.",
                remedy="pass pipeline.unet.module in its place",
            ),
        ),
        (
            offloaded,
            Refusal(
                "pipeline.unet is offloaded by accelerate's ModelHook",
                cause="The pipeline was loaded with a device map, or enable_model_cpu_offload() was called.",
                remedy="call pipeline.remove_all_hooks()",
            ),
        ),
        (
            offloaded_inside,
            Refusal(
                "pipeline.unet is offloaded by accelerate's ModelHook",
                cause="The pipeline was loaded with a device map, or enable_model_cpu_offload() was called.",
                remedy="backbone.free_text_encoders() keeps the text encoders off the device",
            ),
        ),
        (
            cast_by_layers,
            Refusal(
                "pipeline.unet has diffusers' hooks (layerwise_casting)",
                cause="Group offloading, layerwise casting or a cache of diffusers is on.",
                remedy="load the pipeline anew without group offloading",
            ),
        ),
        (
            compiled_in_place,
            Refusal(
                "pipeline.unet or its blocks were compiled in place",
                cause="module.compile() or compile_repeated_blocks() was called on the pipeline's model.",
                remedy="let the trainer compile: TrainConfig(compile=True)",
            ),
        ),
        (
            quantised,
            Refusal(
                "pipeline.unet holds quantised weights (torch.uint8)",
                cause="The pipeline was loaded with a quantization_config, or quantised after that.",
                remedy="load the pipeline without quantization_config, in bfloat16",
            ),
        ),
        (
            in_another_tensor,
            Refusal(
                "pipeline.unet holds quantised weights (Quantised)",
                cause="The pipeline was loaded with a quantization_config, or quantised after that.",
                remedy="base_precision='int8' keeps a LoRA's base in a byte per weight",
            ),
        ),
        (
            on_two_devices,
            Refusal(
                "pipeline.unet lies on cpu and meta",
                cause="A device map spread the pipeline's model over several devices.",
                remedy="load the pipeline without device_map",
            ),
        ),
    ],
)
def test_a_wrapped_model_is_refused_and_left_alone(wrap: Callable[[Any], Any], refusal: Refusal) -> None:
    pipeline = tiny_pipeline("sd15")
    plain = pipeline.unet
    pipeline.unet = wrap(plain)
    with refusal.raised():
        backbone_of(pipeline, lora=LORA)
    assert not any("lora" in name for name, _ in plain.named_parameters())


@pytest.mark.usefixtures("one_rank")
def test_distributed_wrappers_are_refused_on_any_part() -> None:
    pipeline = tiny_pipeline("sd15")
    pipeline.unet = DistributedDataParallel(pipeline.unet)
    with Refusal(
        "pipeline.unet is wrapped in DistributedDataParallel",
        cause="The pipeline's model was replaced by a data-parallel wrapper of torch.",
        remedy="the trainer averages gradients over the ranks of torch.distributed itself",
    ).raised():
        backbone_of(pipeline)
    pipeline = tiny_pipeline("sd15")
    pipeline.text_encoder = sharded(pipeline.text_encoder)
    with Refusal(
        "pipeline.text_encoder is sharded by FSDP",
        cause="A part of the pipeline was sharded with fully_shard or FullyShardedDataParallel.",
        remedy="load the pipeline anew and leave it whole",
    ).raised():
        backbone_of(pipeline)


def test_a_model_without_a_pipeline_is_refused_too() -> None:
    pipeline = tiny_pipeline("sd15")
    with Refusal(
        "model is wrapped by torch.compile",
        cause="`adapt` got torch.compile(model).",
        remedy="pass model._orig_mod in its place",
    ).raised():
        adapt(compiled(pipeline.unet), pipeline.text_encoder, pipeline.vae, latent_shape=(4, 8, 8))


def test_compiled_encoders_and_decoders_give_the_same_images_and_files(tmp_path: Path) -> None:
    _, expected = ode_images(backbone_of(tiny_pipeline("sd15")), PROMPTS[:2], 2.0)
    pipeline = tiny_pipeline("sd15")
    pipeline.text_encoder, pipeline.vae = compiled(pipeline.text_encoder), compiled(pipeline.vae)
    backbone = backbone_of(pipeline)
    _, images = ode_images(backbone, PROMPTS[:2], 2.0)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    save_backbone(backbone, tmp_path / "saved")
    load_pipeline(tmp_path / "saved")
    for part in ("unet", "vae"):
        saved = load_file(tmp_path / "saved" / part / "diffusion_pytorch_model.safetensors")
        assert not any("_orig_mod" in name for name in saved)
