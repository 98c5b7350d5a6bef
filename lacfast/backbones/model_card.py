"""The model card of a saved pipeline or LoRA: README.md as the hub and plain diffusers' users read it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What lies in a directory, as far as it takes to load it."""

    pipeline: str
    """diffusers' class."""
    task: str
    """What the pipeline does, by the hub's name: "text-to-image"."""
    base: str | None
    """Hub id or directory of the untrained pipeline; None: unknown."""
    part: str
    """Component that is trained."""
    model: str
    """Its class."""
    kind: str
    """"lora" and "peft" are adapters that diffusers' pipeline or peft loads, "part" all weights of the
    trained component alone, "pipeline" everything."""
    merged_loras: Mapping[str, float]
    """LoRAs in the base's weights, with theirs."""
    in_peft_layout: Collection[str] = ()
    """The merged LoRAs that peft loads."""

    @property
    def is_on_hub(self) -> bool:
        return self.base is not None and not Path(self.base).is_absolute()

    @property
    def base_code(self) -> str:
        return f'"{self.base}"' if self.is_on_hub else "BASE"


def model_card(saved: Saved) -> str:
    """Metadata of the hub, what the directory holds, and the lines that load it."""
    is_lora = saved.kind in ("lora", "peft")
    metadata = ["library_name: diffusers", f"pipeline_tag: {saved.task}"]
    metadata += [f"base_model: {saved.base}"] * saved.is_on_hub
    metadata += ["tags:", *(f"- {tag}" for tag in ("lacfast", "reinforcement-learning", *["lora"] * is_lora))]
    what = {"part": saved.part, "pipeline": "pipeline"}.get(saved.kind, "LoRA")
    return "\n".join(
        [
            *("---", *metadata, "---", ""),
            f"A {saved.pipeline}'s {what}, trained by reinforcement learning with lacfast. Where there is a",
            "critic.safetensors, it is its value function, and `lacfast steer` samples with it.",
            *("", "```python", *_LINES[saved.kind](saved), "```", ""),
        ]
    )


def _pipeline(saved: Saved) -> list[str]:
    return [
        f"from diffusers import {saved.pipeline}",
        "",
        f'pipeline = {saved.pipeline}.from_pretrained("THIS_MODEL")',
    ]


def _part(saved: Saved) -> list[str]:
    return [
        f"from diffusers import {saved.pipeline}, {saved.model}",
        "",
        f'{saved.part} = {saved.model}.from_pretrained("THIS_MODEL", subfolder="{saved.part}")',
        f"pipeline = {saved.pipeline}.from_pretrained({saved.base_code}, {saved.part}={saved.part})",
    ]


def _adapter(saved: Saved) -> list[str]:
    """A LoRA on its base, into which others are merged first, one after the other."""
    uses_peft = saved.kind == "peft" or bool(saved.in_peft_layout)
    lines = [
        f"from diffusers import {saved.pipeline}",
        *["from peft import PeftModel"] * uses_peft,
        *["from peft.helpers import rescale_adapter_scale"] * bool(saved.in_peft_layout),
        "",
        f"pipeline = {saved.pipeline}.from_pretrained({saved.base_code})",
    ]
    for source, weight in saved.merged_loras.items():
        if source in saved.in_peft_layout:
            lines += [
                f"merged = PeftModel.from_pretrained(pipeline.{saved.part}, {_peft_argument(source)})",
                f"with rescale_adapter_scale(merged, {weight}):",
                f"    pipeline.{saved.part} = merged.merge_and_unload()",
            ]
        else:
            lines += [
                f"pipeline.load_lora_weights({_diffusers_arguments(source)})",
                f"pipeline.fuse_lora(lora_scale={weight})",
                "pipeline.unload_lora_weights()",
            ]
    if saved.kind == "lora":
        return [*lines, 'pipeline.load_lora_weights("THIS_MODEL")']
    adapted = f'PeftModel.from_pretrained(pipeline.{saved.part}, "THIS_MODEL")'
    return [*lines, f"pipeline.{saved.part} = {adapted}.merge_and_unload()"]


def _diffusers_arguments(source: str) -> str:
    """A LoRA as diffusers is told of it: repository and file apart, which are one name here."""
    parts = source.split("/")
    if Path(source).is_absolute() or len(parts) < 3:
        return f'"{source}"'
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    return f'"{repository}", weight_name="{file}"'


def _peft_argument(source: str) -> str:
    """A LoRA as peft is told of it: by its directory alone."""
    path = Path(source)
    return f'"{path.parent if path.suffix == ".safetensors" else source}"'


_LINES = {"pipeline": _pipeline, "part": _part, "lora": _adapter, "peft": _adapter}
"""Kind -> the lines that load it."""
