"""What is saved scales alike in every program, has a card, and goes to the hub when it is told to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import Refusal
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import backbone_of, tiny_pipeline
from tiny_trainers import differing, trainer_of

from lacfast import LoRAConfig, push_to_hub
from lacfast.backbones import publishing
from lacfast.backbones.model_card import Saved, model_card
from lacfast.backbones.storage import EXACT_WEIGHTS
from lacfast.checkpoint import save_backbone, save_run

FILE = "pytorch_lora_weights.safetensors"


def change(state: dict[str, Any], module: str, scale: float) -> torch.Tensor:
    return scale * state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]


def with_weights(rank: int, alpha: float | None) -> Any:
    """A backbone whose LoRA is no identity."""
    backbone = backbone_of(tiny_pipeline("flux"), lora=LoRAConfig(rank=rank, alpha=alpha))
    with torch.no_grad():
        for number, tensor in enumerate(backbone.policy_state().values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    return backbone


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (4, 1), (4, None), (3, 6), (4, 3)])
def test_a_saved_lora_has_the_same_change_for_who_reads_alpha_and_for_who_does_not(
    rank: int, alpha: float | None, tmp_path: Path
) -> None:
    backbone = with_weights(rank, alpha)
    save_backbone(backbone, tmp_path / "saved")
    state, module = backbone.policy_state(), "transformer_blocks.0.attn.to_q"
    wanted = change(state, module, 1 if alpha is None else alpha / rank)
    saved = {
        name.removeprefix("transformer."): each for name, each in load_file(tmp_path / "saved" / FILE).items()
    }
    # ComfyUI and sd-scripts look for keys with alpha, find none, and take 1.
    assert not any("alpha" in name for name in saved)
    torch.testing.assert_close(change(saved, module, 1), wanted, rtol=1e-6, atol=0)
    with safe_open(tmp_path / "saved" / FILE, framework="pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert told["transformer.lora_alpha"] == told["transformer.r"]
    # A run that goes on has the same bits, also where a scale of 3 / 4 rounds what others load.
    assert not differing(state, backbone.read_policy(tmp_path / "saved"))
    assert (tmp_path / "saved" / EXACT_WEIGHTS).exists() == (alpha == 3)


def test_a_card_tells_base_use_and_settings(tmp_path: Path) -> None:
    backbone = with_weights(2, None)
    save_backbone(backbone, tmp_path / "saved", notes={"run.json": {"train": {"seed": 7}}})
    card = (tmp_path / "saved" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "- lora\n" in card
    assert '"seed": 7' in card
    assert "base_model" not in card, "a path says nothing to others"
    backbone.storage.base = "black-forest-labs/FLUX.1-dev"
    save_backbone(backbone, tmp_path / "hub")
    assert "base_model: black-forest-labs/FLUX.1-dev\n" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize(
    ("source", "layout", "line"),
    [
        ("owner/name", "diffusers", 'load_lora_weights("owner/name")'),
        ("owner/name/a/b.safetensors", "diffusers", '("owner/name", weight_name="a/b.safetensors")'),
        ("/mine/b.safetensors", "diffusers", 'load_lora_weights("/mine/b.safetensors")'),
        ("owner/name-v1.0", "peft", '(pipeline.transformer, "owner/name-v1.0")'),
        ("/mine/adapter_model.safetensors", "peft", '(pipeline.transformer, "/mine")'),
    ],
)
def test_a_card_names_a_merged_lora_as_its_loader_takes_it(source: str, layout: str, line: str) -> None:
    saved = Saved(
        pipeline="FluxPipeline",
        task="text-to-image",
        base="owner/base",
        part="transformer",
        model="FluxTransformer2DModel",
        kind="lora",
        merged_loras={source: 0.5},
        in_peft_layout=[source] if layout == "peft" else [],
    )
    assert line in model_card(saved)


class Hub:
    """What is asked of the hub."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, repository: str, **arguments: Any) -> SimpleNamespace:
        self.calls.append((repository, arguments))
        return SimpleNamespace(repo_id=repository)

    def upload_folder(self, **arguments: Any) -> SimpleNamespace:
        self.calls.append(("upload", arguments))
        return SimpleNamespace(commit_url="https://huggingface.co/somebody/cats/commit/1")


def test_a_saved_model_goes_to_the_hub_without_what_only_training_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(publishing, "HfApi", lambda token: hub)
    with Refusal(
        "holds no saved model",
        cause="`push_to_hub` got a directory that no save wrote.",
        remedy="pass a checkpoint, as runs/cats/checkpoints/best",
    ).raised():
        push_to_hub(tmp_path, "somebody/cats")
    assert not hub.calls
    save_run(backbone_of(tiny_pipeline("sd3"), lora=LoRAConfig(rank=2)), {"iteration": 1}, tmp_path / "run")
    assert push_to_hub(tmp_path / "run", "somebody/cats").endswith("commit/1")
    (repository, made), (_, sent) = hub.calls
    assert (repository, made) == ("somebody/cats", {"private": True, "exist_ok": True})
    kept = {path.name for path in sent["folder_path"].iterdir()} - set(sent["ignore_patterns"])
    assert kept == {FILE, "lacfast.json", "README.md"}


def test_a_model_in_float16_is_not_trained() -> None:
    backbone = backbone_of(tiny_pipeline("sd3"), lora=LoRAConfig(rank=2), dtype=torch.float16)
    with Refusal(
        "the model runs in float16, whose smallest numbers lie above the gradients",
        cause="A model is trained in float16.",
        remedy="load it with dtype=torch.bfloat16 or float32",
    ).raised():
        trainer_of(backbone)
