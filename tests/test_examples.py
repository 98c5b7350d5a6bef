"""The Python of the pages runs, block after block, on tiny pipelines; test_readme.py has the README's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from tiny_pipelines import PROMPTS as PIPELINE_PROMPTS
from tiny_pipelines import tiny_pipeline
from tiny_trainers import shrunk

import lacfast
from lacfast.checkpoint import save_backbone
from lacfast.rewards import names

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {
    page.relative_to(DOCS).as_posix(): blocks
    for page in sorted(DOCS.rglob("*.md"))
    if (blocks := re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M))
}
CPU = {'device="cuda"': 'device="cpu"'}
TINY: dict[str, dict[str, str]] = {
    "index.md": CPU
    | {
        '"stabilityai/stable-diffusion-3.5-medium"': "pipeline('sd3')",
        'lacfast.recipe("sd35m-pickscore").train': "shrunk(lacfast.recipe('sd35m-pickscore').train)",
        "trainer.train(100)": "trainer.train(1)",
    },
    "families/sd15.md": CPU
    | {
        '"stable-diffusion-v1-5/stable-diffusion-v1-5"': "pipeline('sd15')",
        "num_steps=20": "num_steps=2",
        "config = lacfast.TrainConfig(": "config = lacfast.TrainConfig(batch_size=4, iterations=1, ",
    },
    "families/sdxl.md": CPU
    | {
        '"stabilityai/stable-diffusion-xl-base-1.0"': "pipeline('sdxl')",
        "resolution=(1024, 1024)": "resolution=(16, 16)",
    },
    "families/sd3.md": CPU
    | {
        '"stabilityai/stable-diffusion-3.5-medium"': "pipeline('sd3')",
        "resolution=(512, 512)": "resolution=(16, 16)",
    },
    "families/flux.md": CPU
    | {
        '"black-forest-labs/FLUX.1-dev"': "pipeline('flux')",
        "resolution=(512, 512)": "resolution=(16, 16)",
        '"_native_flash"': '"sdpa"',
    },
    "families/qwen_image.md": CPU
    | {
        '"Qwen/Qwen-Image"': "pipeline('qwen_image')",
        "resolution=(512, 512), max_sequence_length=256": "resolution=(16, 16), max_sequence_length=16",
    },
    "families/flux2.md": CPU
    | {
        '"black-forest-labs/FLUX.2-klein-base-4B"': "pipeline('flux2_klein')",
        "resolution=(512, 512), max_sequence_length=256": "resolution=(16, 16), max_sequence_length=16",
    },
    "families/z_image.md": CPU
    | {
        '"Tongyi-MAI/Z-Image"': "pipeline('z_image')",
        "resolution=(512, 512), max_sequence_length=256": "resolution=(16, 16), max_sequence_length=16",
    },
    "families/sana.md": CPU
    | {
        '"Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"': "pipeline('sana')",
        "resolution=(1024, 1024)": "resolution=(16, 16), max_sequence_length=16",
    },
    "families/pixart.md": CPU
    | {
        '"PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"': "pipeline('pixart')",
        "resolution=(1024, 1024)": "resolution=(16, 16), max_sequence_length=16",
    },
    "families/wan.md": CPU
    | {
        '"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"': "pipeline('wan')",
        "resolution=(240, 416), num_frames=33, judged_frames=9": (
            "resolution=(16, 16), max_sequence_length=16, num_frames=5, judged_frames=2"
        ),
    },
    "migration.md": {
        'DefaultDDPOStableDiffusionPipeline("stable-diffusion-v1-5/stable-diffusion-v1-5", use_lora=True)': (
            "pipeline('sd15')"
        ),
        "sample_batch_size=6, sample_num_batches_per_epoch=10, train_batch_size=3": (
            "sample_batch_size=2, sample_num_batches_per_epoch=1, train_batch_size=2, num_epochs=1, "
            "sample_num_steps=2, logdir='logs', train_gradient_accumulation_steps=1"
        ),
    },
}
"""What a page's lines say, and what a CPU without downloads runs in its place."""


def given() -> dict[str, Any]:
    """What pages speak of without making it."""
    config = tiny_config(iterations=1)
    return {
        "torch": torch,
        "lacfast": lacfast,
        "pipeline": tiny_pipeline,
        "shrunk": shrunk,
        "backbone": tiny_backbone("dit"),
        "config": config,
        "trainer": lacfast.LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, config),
        "prompts": PIPELINE_PROMPTS[:2],
        "images": torch.zeros(2, 3, 8, 8),
        "metadata": [{}, {}],
        "reward_function": lambda images, prompts, metadata: (images.mean(dim=(1, 2, 3)), {}),
        "their_reward": lambda images, prompts, metadata: {"ocr": images.mean(dim=(1, 2, 3))},
        "prompt_function": lambda: (PIPELINE_PROMPTS[0], {}),
        "image_outputs_logger": lambda images, step, log: None,
    }


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(names.BUILT_IN, "pickscore", "tiny_backbones:brightness")
    monkeypatch.setenv("JUDGE_KEY", "of the page's judge")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    if page == "steering.md":
        save_backbone(given()["trainer"].backbone, tmp_path / "runs" / "shapes" / "checkpoints" / "best")
    namespace, shown = given(), "\n".join(PAGES[page])
    assert [said for said in TINY.get(page, {}) if said not in shown] == []
    for block in PAGES[page]:
        for said, here in TINY.get(page, {}).items():
            block = block.replace(said, here)
        exec(compile(block, page, "exec"), namespace)
