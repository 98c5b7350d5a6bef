"""Recipes: files that say settings, flags that win over them, errors with the path, and dry runs of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import Refusal
from tiny_pipelines import saved_pipeline

from lacfast.backbones.blueprint import Blueprint, load_blueprint
from lacfast.cli import main
from lacfast.config import GRPO, Fixed, KLPenalty, LoRAConfig, Ratio, to_json
from lacfast.runs import plan, train
from lacfast.runs.config import EMBEDDED_MODELS, RunConfig
from lacfast.runs.embedded import TINY_MODELS
from lacfast.runs.recipes import directory, find_recipe, recipe, recipe_names

MINIMAL = "model: shapes-dit\nprompts: shapes\nout: runs/mine\nrewards:\n  shapes: 1\n"


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The settings of the runs that the command line starts, none of which is run."""
    found: list[RunConfig] = []
    monkeypatch.setattr(train, "train", lambda config, *_: found.append(config))
    return found


def test_flags_win_over_the_file(tmp_path: Path, asked: list[RunConfig]) -> None:
    own = written(tmp_path / "mine.yaml", MINIMAL + "train:\n  batch_size: 96\n  iterations: 7\n")
    assert main(["train", own, "--train.batch-size", "64", "--out", "runs/other"]) == 0
    (config,) = asked
    assert (config.out, config.model) == ("runs/other", "shapes-dit")
    assert (config.train.batch_size, config.train.iterations) == (64, 7)


def test_a_run_s_settings_are_a_recipe_again(tmp_path: Path, asked: list[RunConfig]) -> None:
    settings = recipe("flow-grpo-geneval")
    stored = written(tmp_path / "run.json", json.dumps(to_json(settings)))
    assert main(["train", stored]) == 0
    assert asked == [settings]


def test_the_package_s_recipes_go_by_name_and_by_path(asked: list[RunConfig]) -> None:
    assert main(["train", "sd35m-ocr"]) == 0
    assert main(["train", str(directory() / "sd35m-ocr.yaml")]) == 0
    assert asked == [recipe("sd35m-ocr")] * 2


def test_words_lists_and_nested_settings_are_typed(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.yml",
        "# Mine.\n# More.\n" + MINIMAL + "lora: {rank: 4}\ntrain:\n  samples_per_prompt: 4\n"
        "  graph: {mode: off}\n  sampler: {window: fixed:0..5}\n  critic: {trunk: none}\n"
        "  advantages: {estimator: grpo}\n"
        "  ppo:\n    clip: ratio:1e-4\n    kl: penalty:0.04,flow_grpo\n    adam_eps: 1e-8\n",
    )
    found = find_recipe(path)
    assert found.summary == "Mine."
    settings = found.settings.train
    assert found.settings.rewards == (("shapes", 1),)
    assert found.settings.lora == LoRAConfig(rank=4)
    assert (settings.graph.mode, settings.sampler.window) == ("off", Fixed((0, 5)))
    assert settings.advantages.estimator == GRPO()
    assert (settings.ppo.clip, settings.ppo.adam_eps) == (Ratio(1e-4), 1e-8)
    assert settings.ppo.kl == KLPenalty(0.04, "flow_grpo")


def test_plain_values_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    words = "tensorboard: True\nresume: no\nwandb_project: off\nlora: Null\nsave_every: 0x10\n"
    numbers = "train: {seed: 010, ema_decay: .5}\n"
    found = recipe(written(tmp_path / "mine.yaml", MINIMAL + words + numbers))
    assert (found.tensorboard, found.resume, found.wandb_project, found.lora) == (True, "no", "off", None)
    assert (found.save_every, found.train.seed, found.train.ema_decay) == (16, 10, 0.5)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (
            MINIMAL + "train:\n  batchsize: 3\n",
            Refusal(
                "unknown option of TrainConfig 'batchsize'",
                cause="A recipe with an option that is misspelled, or of another version.",
                remedy="did you mean 'batch_size'?",
            ),
        ),
        (
            MINIMAL
            + "train:\n  critic: {trunk: none, hidden_dim: 3}\n  advantages: {estimator: batch_mean}\n",
            Refusal(
                "hidden_dim=3 would be ignored",
                cause="A recipe with an option that nothing reads beside the others.",
                remedy="leave it out",
            ),
        ),
        (
            MINIMAL + "train:\n  batch_size: 3\n  batch_size: 4\n",
            Refusal(
                "'batch_size' stands twice",
                cause="A recipe that says one thing twice.",
                remedy="line 8",
            ),
        ),
        (
            "just words",
            Refusal(
                "holds a str, not settings by name",
                cause="A recipe that is no list of settings.",
                remedy="write `model: ...` and so on",
            ),
        ),
        (
            "model: shapes-dit\nprompts: shapes\n",
            Refusal(
                "RunConfig needs out, rewards",
                cause="A recipe without what every run needs.",
                remedy="write them",
            ),
        ),
        (
            MINIMAL + "train: [\n",
            Refusal(
                "while parsing a flow node",
                cause="A recipe that is no YAML.",
                remedy="line 7",
            ),
        ),
        (
            MINIMAL + "train:\n  ppo: {clip: ration:1e-4}\n",
            Refusal(
                "unknown choice 'ration'; did you mean 'ratio'?",
                cause="A choice in a recipe that is misspelled.",
                remedy="Write ratio:CLIP_RANGE|nats:CLIP_NATS|kl_mask:KL_THRESHOLD",
            ),
        ),
    ],
    ids=lambda value: value.message if isinstance(value, Refusal) else "",
)
def test_a_recipe_that_says_nothing_or_too_much_is_refused_with_its_path(
    text: str, refused: Refusal, tmp_path: Path
) -> None:
    path = written(tmp_path / "mine.yaml", text)
    with refused.raised() as caught:
        find_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_of_an_earlier_version_may_hold_what_nothing_reads(tmp_path: Path) -> None:
    stored = to_json(recipe("flow-grpo-geneval"))
    stored["train"]["critic"]["hidden_dim"] = 3
    path = written(tmp_path / "run.json", json.dumps(stored))
    assert recipe(path) == recipe("flow-grpo-geneval")


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        (
            "shape",
            Refusal(
                "unknown recipe 'shape'; did you mean 'shapes'?",
                cause="A recipe that is misspelled, or a file without an ending.",
                remedy="A file of your own ends in .yaml or .yml or .json",
            ),
        ),
        (
            "nowhere.yaml",
            Refusal(
                "cannot read the recipe 'nowhere.yaml'",
                cause="A recipe whose file is not there.",
                remedy="known by name: awm-geneval, dance-grpo-hpsv2",
            ),
        ),
    ],
)
def test_a_recipe_that_is_not_there_is_refused(source: str, refused: Refusal) -> None:
    with refused.raised():
        find_recipe(source)


FAMILIES = {
    "stable-diffusion-v1": "sd15",
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-3.5": "sd3",
    "FLUX.1": "flux",
    "FLUX.2-klein": "flux2_klein",
    "Qwen-Image": "qwen_image",
    "SANA": "sana",
    "PixArt-Sigma": "pixart",
    "Z-Image": "z_image",
    "Wan2.1": "wan",
}
"""What a model's id holds -> its tiny pipeline."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = tmp_path_factory.mktemp("pipelines")
    return {part: saved_pipeline(family, found / family) for part, family in FAMILIES.items()}


ALIKE = {
    "dance-grpo-hpsv2-lora": "flux-pickscore",
    "ddpo-compressibility": "sd15-ddpo",
    "flux-pickscore-24gb": "flux-pickscore",
    "sd35m-geneval": "sd35m-ocr",
    "shapes-unet": "shapes",
    "shapes-unet-ppo": "shapes-ppo",
}
"""Recipes of a model and a way of training that another one has too; the gate runs them."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in recipe_names()]
)
def test_every_recipe_dry_runs(
    name: str, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tiny model of its family; tests/bench/test_memory.py plans the whole ones."""
    settings = recipe(name)
    assert find_recipe(name).summary.endswith("."), "the help shows the first line of its comment alone"

    def small(source: str, **named: Any) -> Blueprint:
        (directory,) = (path for part, path in tiny.items() if part in source)
        return load_blueprint(directory, **named)

    monkeypatch.setattr(plan, "load_blueprint", small)
    assert settings.model in TINY_MODELS or any(part in settings.model for part in FAMILIES)
    flags = ["--gpus", str(settings.train.shard)]
    # A tiny model has fewer blocks, and pictures that are no larger than these.
    if settings.train.critic.trunk == "branch":
        flags += ["--train.critic.num-blocks", "1"]
    if settings.pipeline.resolution is not None:
        flags += ["--pipeline.resolution", "32", "32"]
    assert main(["train", name, "--dry-run", *flags]) == 0
    printed = capsys.readouterr().out
    assert "Memory at its peak" in printed
    assert json.loads(printed[printed.index("{\n") :])["train"]["batch_size"] == settings.train.batch_size


def test_settings_and_models_that_are_made_on_the_spot_agree() -> None:
    assert sorted(EMBEDDED_MODELS) == sorted(TINY_MODELS)
