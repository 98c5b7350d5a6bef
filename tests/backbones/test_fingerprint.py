"""What was trained on one pipeline is not loaded on another one without a word."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from refusals import Refusal
from tiny_pipelines import backbone_of, tiny_pipeline, use_first_order

from lacfast import LoRAConfig, load_backbone
from lacfast.backbones.fingerprint import Fingerprint
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.storage import DESCRIPTION
from lacfast.checkpoint import load_weights, save_backbone
from lacfast.runtime.directories import MANIFEST

LORA = LoRAConfig(rank=2, alpha=4)
PART = "unet"


def fingerprint(pipeline: Any, dtype: torch.dtype = torch.float32) -> Fingerprint:
    modules = {name: getattr(pipeline, name).to(dtype) for name in (PART, "vae", "text_encoder")}
    return Fingerprint.of(modules, pipeline.scheduler)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "lora"
    pipeline = tiny_pipeline("sd15")
    use_first_order(pipeline)
    save_backbone(backbone_of(pipeline, lora=LORA), directory)
    return directory


def base(change: Callable[[Any], None] = lambda pipeline: None) -> Any:
    pipeline = tiny_pipeline("sd15")
    use_first_order(pipeline)
    change(pipeline)
    return pipeline


def fuse_a_lora(pipeline: Any) -> None:
    """As pipeline.fuse_lora() and unload_lora_weights() leave it: products of rank 1 in the attention."""
    with torch.no_grad():
        for name, weight in pipeline.unet.named_parameters():
            if name.endswith("to_q.weight"):
                weight += 1e-3 * torch.outer(torch.ones(len(weight)), torch.ones(weight.shape[1]))


def give_another_vae(pipeline: Any) -> None:
    pipeline.vae = tiny_pipeline("sd15", seed=1).vae


def give_another_text_encoder(pipeline: Any) -> None:
    pipeline.text_encoder = tiny_pipeline("sd15", seed=1).text_encoder


def give_another_spacing(pipeline: Any) -> None:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (fuse_a_lora, "the weights of its unet are others"),
        (give_another_vae, "the weights of its vae are others"),
        (give_another_text_encoder, "the weights of its text_encoder are others"),
        (give_another_spacing, "its scheduler's timestep_spacing was 'leading' and is 'trailing'"),
    ],
)
def test_a_lora_is_not_loaded_on_another_base(
    saved: Path, change: Callable[[Any], None], difference: str
) -> None:
    with Refusal(
        "was trained on another pipeline than this one",
        cause="A LoRA's base was changed in memory before the training (a fused LoRA, another scheduler, "
        "UNet or VAE), or another base is given now.",
        remedy="Pass the pipeline that it was trained on, say load_backbone(..., base=pipeline)",
    ).raised() as caught:
        load_backbone(saved, base=base(change))
    assert f"{difference}. Pass" in str(caught.value)


def test_a_checkpoint_is_not_loaded_into_another_base(saved: Path) -> None:
    other = backbone_of(base(fuse_a_lora), lora=LORA)
    with pytest.raises(
        ValueError, match="was trained on another pipeline than this one: the weights of its unet"
    ):
        load_weights(other, saved)


def test_trained_weights_may_differ_and_the_parts_beside_them_may_not(tmp_path: Path) -> None:
    save_backbone(backbone_of(base()), tmp_path / "whole")
    load_weights(backbone_of(base(fuse_a_lora)), tmp_path / "whole")
    with pytest.raises(ValueError, match=r"this one: the weights of its vae are others\. Pass"):
        load_weights(backbone_of(base(give_another_vae)), tmp_path / "whole")


def test_the_same_base_loads_in_silence_in_any_dtype_and_under_another_solver(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_backbone(saved, base=base(), dtype=torch.bfloat16)
        assert isinstance(loaded, LatentBackbone)
    # PNDM becomes DDIM, so it has the same noise levels.
    load_backbone(saved, base=tiny_pipeline("sd15"))


@pytest.mark.parametrize("dtypes", [(torch.float16,), (torch.bfloat16,), (torch.float16, torch.bfloat16)])
def test_rounding_a_model_leaves_its_fingerprint(dtypes: tuple[torch.dtype, ...]) -> None:
    original, rounded = fingerprint(base()), tiny_pipeline("sd15")
    use_first_order(rounded)
    for dtype in dtypes:
        found = fingerprint(rounded, dtype)
    assert original.differences(found) == found.differences(original) == []


def test_a_fingerprint_survives_json_and_is_small() -> None:
    found = fingerprint(base())
    text = json.dumps(found.to_json())
    again = Fingerprint.from_json(json.loads(text))
    assert again.scheduler == found.scheduler
    assert all(torch.equal(again.parts[name], values) for name, values in found.parts.items())
    tensors = sum(len(list(getattr(base(), name).parameters())) for name in found.parts)
    assert len(text) < 12 * tensors + 2000


def test_a_directory_of_an_earlier_version_loads_with_a_warning(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        if file.name != MANIFEST:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    description = json.loads((tmp_path / DESCRIPTION).read_text(encoding="utf-8"))
    del description["fingerprint"]
    (tmp_path / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"does not tell which weights .* saving it again writes them down"):
        load_backbone(tmp_path, base=base())


def test_another_alpha_than_the_saved_one_is_refused_with_both(saved: Path) -> None:
    with Refusal(
        "the directory holds a LoRA of",
        cause="`lora` beside a directory that was saved with another one: rank, alpha or modules.",
        remedy="leave lora out",
    ).raised() as caught:
        load_backbone(saved, base=base(), lora=LoRAConfig(rank=2, alpha=8))
    assert "alpha=4" in str(caught.value)
    assert "alpha=8" in str(caught.value)
