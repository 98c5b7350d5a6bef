"""The model card of a saved pipeline or LoRA: README.md as the hub and plain diffusers' users read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def model_card(pipeline: str, base: str | None, *, is_lora: bool, merged_loras: Mapping[str, float]) -> str:
    """Metadata of the hub, what the directory holds, and the lines that load it.

    Args:
        pipeline: diffusers' class.
        base: hub id or directory of the untrained pipeline; None: unknown.
        is_lora: only a LoRA was saved.
        merged_loras: LoRAs in the base's weights, with theirs.
    """
    is_on_hub = base is not None and not Path(base).is_absolute()
    named = f'"{base}"' if is_on_hub else "BASE"
    metadata = ["library_name: diffusers", "pipeline_tag: text-to-image"]
    metadata += [f"base_model: {base}"] * is_on_hub
    metadata += ["tags:", *(f"- {tag}" for tag in ("lacfast", "reinforcement-learning", *["lora"] * is_lora))]
    code = ["from diffusers import " + pipeline, ""]
    if not is_lora:
        code.append(f'pipeline = {pipeline}.from_pretrained("THIS_MODEL")')
    else:
        code += [
            f"pipeline = {pipeline}.from_pretrained({named})",
            'pipeline.load_lora_weights("THIS_MODEL")',
        ]
    if is_lora and merged_loras:
        names = ["trained", *(f"merged_{number}" for number in range(1, len(merged_loras) + 1))]
        sources = zip(names, ["THIS_MODEL", *merged_loras], strict=True)
        code[-1:] = [f'pipeline.load_lora_weights("{each}", adapter_name="{name}")' for name, each in sources]
        code.append(f"pipeline.set_adapters({names}, {[1.0, *merged_loras.values()]})")
    what = "LoRA" if is_lora else "pipeline"
    return "\n".join(
        [
            *("---", *metadata, "---", ""),
            f"A {pipeline}'s {what}, trained by reinforcement learning with lacfast. Where there is a",
            "critic.safetensors, it is its value function, and `lacfast steer` samples with it.",
            *("", "```python", *code, "```", ""),
        ]
    )
