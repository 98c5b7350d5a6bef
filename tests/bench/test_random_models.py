"""The GPU tables' models and arms, rehearsed on a CPU: equal results, errors that stay local."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import gpu_arms
from bench.arms import ARMS, EAGER, arm_changes
from bench.gpu_arms import Bench, Plan, Work
from bench.random_models import PPO, Subject, match_of, random_pipeline, tiny_subject, tiny_subjects
from lacfast.backbones.compilation import CompiledForward
from lacfast.backbones.published import PublishedModel
from lacfast.config import Fixed, SamplerConfig
from tests import tiny_pipelines

CPU = torch.device("cpu")
PLAN = Plan(device=CPU, dtype=torch.float32, batches=(2,), rounds=1, arms=(EAGER, "graph"))
PROMPTS: dict[str, dict[str, tuple[int, ...]]] = {
    "sd15": {"encoder_hidden_states": (12, 16)},
    "sd3": {"encoder_hidden_states": (12, 32), "pooled_projections": (32,)},
    "flux": {"encoder_hidden_states": (12, 32), "pooled_projections": (16,)},
}
"""Shapes of the tiny pipelines' prompts."""


class TinyPublished(PublishedModel):
    """A published model's description, of a tiny pipeline without its text encoders."""

    def build(self, *, device: str | torch.device = "meta", text_encoders: bool = True) -> Any:
        built = tiny_pipelines.BUILDERS[self.title]()
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if hasattr(built, name):
                setattr(built, name, None)
        return built


def tiny_published(family: str) -> PublishedModel:
    return TinyPublished(
        title=family,
        hub_ids=(),
        pipeline="",
        arguments={},
        parameters=0,
        resolution=(16, 16),
        prompt=PROMPTS[family],
        parts={},
    )


@pytest.mark.parametrize("family", PROMPTS)
def test_a_published_model_samples_and_learns_from_random_weights(family: str) -> None:
    published = tiny_published(family)
    kind, window = ("ddim", Fixed((0, 2))) if family == "sd15" else ("flow_sde", None)
    subject = Subject(
        title=family,
        build=lambda dtype: random_pipeline(published, CPU, dtype),
        ppo=PPO["flow_grpo" if family == "sd3" else None],
        sampler=SamplerConfig(kind=kind, num_steps=2, noise_level=1.0, window=window),
    )
    bench = Bench(subject, Plan(device=CPU, dtype=torch.bfloat16, batches=(2,), rounds=1, arms=(EAGER,)))
    assert bench.backbone.dtype == torch.bfloat16
    rows = [*bench.sampling(), *bench.update()]
    assert not [row["error"] for row in rows if "error" in row]
    assert {row["values"] for row in rows if "values" in row} == set(gpu_arms.TRUNKS)
    assert all(row["milliseconds"] > 0 for row in rows)


def test_a_graph_gives_what_the_eager_step_gives() -> None:
    bench = Bench(tiny_subject("dit", CPU, 9), PLAN)
    rows = [row for row in bench.sampling() if "values" not in row]
    assert [(row["batch"], row["arm"]) for row in rows] == [(2, EAGER), (2, "graph")]
    assert all(row["difference"] == 0 for row in rows)


def test_an_arm_that_fails_leaves_its_reason_and_the_others_their_times() -> None:
    bench = Bench(tiny_subject("unet", CPU, 8), PLAN)

    def fails() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    works = {EAGER: Work(call=lambda: time.sleep(0.02)), "graph": Work(call=fails)}
    rows = list(bench._rows("update", 1, works, 4, None))
    assert rows[0]["milliseconds"] >= 20 / 4, "time per unit of work"
    assert rows[0][f"over_{EAGER}"] == 1
    assert "not permitted" in rows[1]["error"]
    assert "milliseconds" not in rows[1]
    assert "not permitted" in gpu_arms.line(rows[1])


def test_all_arms_share_one_model_whose_blocks_are_compiled_only_while_such_an_arm_runs() -> None:
    subject, made = tiny_subject("dit", CPU, 9), []

    def build(dtype: torch.dtype) -> Any:
        made.append(subject.build(dtype))
        return made[-1]

    bench = Bench(replace(subject, build=build), replace(PLAN, arms=tuple(ARMS)))
    blocks = [block for block in made[0].model.modules() if type(block).__name__ in made[0].repeated_blocks]

    def compiled() -> set[bool]:
        return {isinstance(block.forward, CompiledForward) for block in blocks}

    seen = {}
    for arm in ARMS:
        trainer = bench.trainer(arm)
        assert trainer.backbone.model is made[0].model
        seen[arm] = bench._running(arm, compiled)
    assert {arm: run() for arm, run in seen.items()} == {
        arm: {settings.is_compiled} for arm, settings in ARMS.items()
    }
    assert compiled() == {False}
    assert len(made) == 1


def test_memory_is_that_of_a_replaying_call_and_the_captures_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(tiny_subject("dit", CPU, 9), PLAN)
    peaks = []

    def peak(call: Any) -> float:
        before = trainer.graphs.statistics.captures
        call()
        peaks.append(3.0 if trainer.graphs.statistics.captures > before else 1.0)
        return peaks[-1]

    monkeypatch.setattr(bench, "_peak_gigabytes", peak)
    trainer = bench.trainer("graph", 2)
    rollout = gpu_arms.rollout_of(trainer, 2)
    work = Work(call=lambda: trainer.update(rollout), trainer=trainer)
    (row,) = bench._rows("update", 2, {"graph": work}, 1, None)
    assert trainer.graphs.statistics.captures > 0
    assert 3.0 in peaks[:-1]
    assert row["preparing_gigabytes"] == 3
    assert row["working_gigabytes"] == 1


def test_the_batch_of_a_row_is_the_one_that_ran() -> None:
    bench = Bench(tiny_subject("dit", CPU, 9), PLAN)
    works = {
        EAGER: Work(call=lambda: None, size=lambda: 0),
        "graph": Work(call=lambda: None, size=lambda: 2),
    }
    whole, halved = bench._rows("sampling", 4, works, 1, None)
    assert (whole["batch"], halved["batch"], halved["asked"]) == (4, 2, 4)
    assert "asked" not in whole
    assert f"over_{EAGER}" not in halved, "another batch is no comparison"
    assert "batch 2 of 4" in gpu_arms.line(halved)


def test_an_arm_that_compiles_for_too_long_is_left_out_for_its_model() -> None:
    bench = Bench(tiny_subject("dit", CPU, 9), replace(PLAN, prepare_seconds=0.05))
    calls = []

    def compiles() -> None:
        calls.append(1)
        time.sleep(5)

    for batch in (1, 4):
        works = {EAGER: Work(call=lambda: time.sleep(0.1)), "compile": Work(call=compiles)}
        eager, row = bench._rows("sampling", batch, works, 1, None)
        assert "error" not in eager, "an arm that compiles nothing has its time"
        assert row["error"].startswith("TimeoutError: not compiled within 0.2")
    assert len(calls) == 1


def test_an_arm_that_captures_again_and_again_is_a_fault() -> None:
    bench = Bench(tiny_subject("dit", CPU, 9), PLAN)
    trainer = bench.trainer("graph")

    def captures() -> None:
        trainer.graphs.statistics.captures += 1

    (row,) = bench._rows("sampling", 1, {"graph": Work(call=captures, trainer=trainer)}, 1, None)
    assert "still compiles, warms up or captures" in row["error"]


def test_what_does_not_fit_the_time_or_the_memory_is_named() -> None:
    def too_large(dtype: torch.dtype) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    subject = tiny_subject("dit", CPU, 9)
    large = Subject(title="large", build=too_large, ppo=subject.ppo, sampler=subject.sampler)
    rows: list[Any] = []
    missing = gpu_arms.collect("sampling", [large], PLAN, seconds=60, on_rows=rows.extend)
    assert missing == {"large": "OutOfMemoryError: CUDA out of memory"}
    missing = gpu_arms.collect("sampling", [subject], PLAN, seconds=-1, on_rows=rows.extend)
    assert "not started" in missing[subject.title]
    assert not rows


def test_every_arm_is_a_setting_of_the_engine() -> None:
    for arm in ARMS.values():
        changes = arm_changes(arm, CPU)
        assert changes["compile"] == arm.is_compiled
        assert changes["graph"].mode == ("fake" if arm.is_captured else "off")


def test_subjects_of_the_iteration_have_a_peer() -> None:
    for subject in tiny_subjects(CPU):
        match = match_of(subject, torch.float32)
        assert match.trajectories % 8 in (0, 1)
        assert match.build(torch.float32).latent_shape[-1] > 0
