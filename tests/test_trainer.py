"""The trainer learns from what it should, keeps what it must and refuses what cannot train."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, SMALLEST, brightness, tiny_backbone, tiny_config
from tolerances import assert_same_step

from lacfast import LatentActorCriticTrainer
from lacfast.config import (
    AdvantageConfig,
    BatchMean,
    CriticConfig,
    EarlyStoppingConfig,
    KLPenalty,
    PPOConfig,
    Ratio,
    SamplerConfig,
)
from lacfast.prompts import PromptSet
from lacfast.records import Evaluation
from lacfast.rewards.reward import RewardError
from lacfast.runtime.directories import MANIFEST, DamagedError
from lacfast.tasks.models import TINY, ModelSize


def trainer_for(
    family: Any = "dit",
    reward: Any = brightness,
    *,
    model_seed: int = 0,
    size: ModelSize = SMALLEST,
    **changes: Any,
) -> LatentActorCriticTrainer:
    backbone = tiny_backbone(family, seed=model_seed, size=size)
    return LatentActorCriticTrainer(backbone, reward, PROMPTS, tiny_config(**changes))


def weights(trainer: LatentActorCriticTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.backbone.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def test_what_a_run_draws_is_known_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(iterations=3, batch_size=4, rollout_batch_size=3, eval_every=2, eval_samples=3)
    backbone, seen = trainer.backbone, list[str]()
    draws = trainer.draws
    foretold = [draw.texts for draw in (draws.selection(), draws.pretraining(0), draws.pretraining(1))]
    foretold += [draw.texts for draw in draws.upcoming(0)]
    later = [draw.texts for draw in draws.upcoming(2, evaluated=2)]
    encode = backbone.encode_prompts

    def watched(prompts: Any) -> Any:
        seen.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(backbone, "encode_prompts", watched)
    trainer.pretrain_critic()
    trainer.train()
    # Held-out states, two rollouts of value pretraining; evaluation, two iterations; evaluation, another.
    assert [len(texts) for texts in foretold] == [8, 4, 4, 3, 4, 4, 3, 4]
    assert seen == [text for texts in foretold for text in texts]
    assert later == foretold[-1:]


def test_training_raises_an_easy_reward() -> None:
    """Brightness is one linear functional of the latents: a few iterations must move it."""
    trainer = trainer_for(
        batch_size=32, ppo=PPOConfig(clip=Ratio(1e-2), policy_learning_rate=1e-3, num_minibatches=2)
    )
    before = trainer.evaluate(samples=32).means()["brightness"]
    for _ in range(6):
        trainer.train_iteration()
    assert trainer.evaluate(samples=32).means()["brightness"] > before + 0.01


def test_the_rate_rises_over_its_warm_up_and_falls_until_the_run_ends() -> None:
    ppo = PPOConfig(
        clip=Ratio(1e-3),
        num_minibatches=2,
        warmup_steps=3,
        policy_learning_rate=1e-3,
        final_learning_rate=2e-4,
    )
    trainer = trainer_for(iterations=4, ppo=ppo)
    optimizer, rates = trainer.learner.policy_update.optimizer, []
    optimizer.register_step_pre_hook(lambda *_: rates.append(float(optimizer.param_groups[0]["lr"])))
    trainer.train()
    behind = [0, 0, 1 / 4, 1 / 4, 2 / 4, 2 / 4, 3 / 4, 3 / 4]
    warm = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]
    expected = [1e-3 * rise * (1 - 0.8 * share) for rise, share in zip(warm, behind, strict=True)]
    assert rates == pytest.approx(expected)


def test_the_critic_s_rates_fall_together_until_the_run_ends() -> None:
    ppo = PPOConfig(
        num_minibatches=1,
        value_learning_rate=1e-3,
        trunk_learning_rate=3e-4,
        final_value_learning_rate=2e-4,
    )
    trainer = trainer_for(iterations=4, ppo=ppo)
    assert trainer.learner.critic_update is not None
    optimizer, rates = trainer.learner.critic_update.optimizer, []
    optimizer.register_step_pre_hook(
        lambda *_: rates.append([float(g["lr"]) for g in optimizer.param_groups])
    )
    trainer.train()
    left = [1, 0.8, 0.6, 0.4]
    assert rates == [pytest.approx([1e-3 * share, 3e-4 * share]) for share in left]
    refusal = Refusal(
        "final_value_learning_rate=0.01 must be less than value_learning_rate=0.001",
        cause="The critic's rate is to rise.",
        remedy="or None: the rate stays",
    )
    with refusal.raised():
        replace(ppo, final_value_learning_rate=0.01)


def test_the_rate_falls_in_a_loop_of_ones_own_too() -> None:
    ppo = PPOConfig(clip=Ratio(1e-3), num_minibatches=1, policy_learning_rate=1e-3, final_learning_rate=0.0)
    trainer = trainer_for(iterations=2, ppo=ppo)
    rates = []
    for _ in range(4):
        trainer.train_iteration()
        rates.append(float(trainer.learner.policy_update.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([1e-3, 0.5e-3, 0.0, 0.0])


def test_the_rate_follows_the_clock_where_time_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr("lacfast.trainer.time.perf_counter", lambda: float(next(ticks)))
    ppo = PPOConfig(clip=Ratio(1e-3), num_minibatches=1, policy_learning_rate=1e-3, final_learning_rate=0.0)
    trainer = trainer_for(ppo=ppo)
    assert trainer.train(10**9, seconds=20) > 1
    rate = float(trainer.learner.policy_update.optimizer.param_groups[0]["lr"])
    assert 0 < trainer.learner.progress < 1
    assert rate == pytest.approx(1e-3 * (1 - trainer.learner.progress))
    assert rate < 0.5e-3


def test_value_pretraining_leaves_the_actor_alone_and_resets_the_optimizer() -> None:
    trainer = trainer_for()
    before = weights(trainer)
    result = trainer.pretrain_critic()
    assert not changed(before, weights(trainer))
    assert trainer.learner.critic_update is not None
    assert trainer.learner.critic_update.optimizer.state == {}
    assert result.images == 8 + 2 * 8 == trainer.images
    assert result.explained_variance.shape == (4, 1)


def test_a_kl_weight_keeps_a_reference_that_does_not_move() -> None:
    trainer = trainer_for(ppo=PPOConfig(clip=Ratio(1e-3), kl=KLPenalty(0.1), num_minibatches=2))
    assert trainer.learner.anchor is not None
    frozen = trainer.learner.anchor.backbone.model
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    trainer.train_iteration()
    metrics = trainer.train_iteration()
    assert not changed(before, frozen.state_dict())
    assert float(metrics["kl_ref"].nan_to_num().sum()) > 0


@pytest.mark.isa
def test_microbatches_do_not_change_the_update() -> None:
    results = []
    for size in (3, 100):
        ppo = PPOConfig(clip=Ratio(1e-3), microbatch_size=size, num_minibatches=1, adam_eps=1e-4)
        trainer = trainer_for(ppo=ppo, size=TINY)
        before = weights(trainer)
        trainer.train_iteration()
        results.append(weights(trainer))
    assert_same_step(*results, before)


@pytest.mark.parametrize("cfg_grad", ["cond", "both"])
def test_guided_rollouts_train_from_a_ratio_of_one(cfg_grad: str) -> None:
    trainer = trainer_for(
        sampler=SamplerConfig(num_steps=4, guidance_scale=2.5),
        ppo=PPOConfig(clip=Ratio(1e-3), num_minibatches=2, cfg_grad=cfg_grad),
    )
    before = weights(trainer)
    assert trainer.train_iteration()["first_max_abs_log_ratio"] < 1e-6
    assert changed(before, weights(trainer))


def test_a_saved_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    trainer = trainer_for()
    trainer.pretrain_critic()
    trainer.train_iteration()
    trainer.save(tmp_path / "run")
    resumed = trainer_for(model_seed=1)
    resumed.load(tmp_path / "run")
    first, second = trainer.train_iteration(), resumed.train_iteration()
    for name in ("policy_loss", "value_loss", "reward/brightness", "policy_grad_norm", "iteration", "images"):
        assert first[name] == second[name], name
    assert not changed(weights(trainer), weights(resumed))


@pytest.mark.parametrize("critic", [CriticConfig(hidden_dim=16, head_dim=8), CriticConfig(trunk="none")])
def test_a_rollout_and_its_update_are_an_iteration_bit_for_bit(critic: CriticConfig) -> None:
    ppo = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, policy_learning_rate=1e-3, final_learning_rate=0.0)
    advantages = AdvantageConfig() if critic.trunk != "none" else AdvantageConfig(estimator=BatchMean())
    one, other = (trainer_for(critic=critic, ppo=ppo, advantages=advantages, iterations=2) for _ in range(2))
    for _ in range(2):
        expected = one.train_iteration()
        rollout = other.next_rollout()
        assert rollout is not None
        found = other.update(rollout)
        for name, value in found.items():
            assert torch.equal(
                torch.as_tensor(value).nan_to_num(-1), torch.as_tensor(expected[name]).nan_to_num(-1)
            ), name
        assert not changed(weights(one), weights(other))
        assert torch.equal(one.normalizer.mean, other.normalizer.mean)
        if one.critic is not None and other.critic is not None:
            assert not changed(one.critic.state_dict(), other.critic.state_dict())
    assert other.iteration == 2


def test_the_start_is_evaluated_and_an_evaluation_is_not_repeated(tmp_path: Path) -> None:
    judged: list[int] = []
    trainer = trainer_for(eval_every=2, iterations=4, early_stopping=EarlyStoppingConfig(patience=9))
    trainer.train(3, on_evaluation=lambda _: judged.append(trainer.iteration))
    assert judged == [0, 2]
    trainer.save(tmp_path / "run")
    resumed = trainer_for(eval_every=2, iterations=4)
    resumed.load(tmp_path / "run")
    assert resumed.train(on_evaluation=lambda _: judged.append(resumed.iteration)) == 1
    assert judged == [0, 2, 4]
    assert resumed.train() == 0
    resumed.config = replace(resumed.config, iterations=2)
    assert resumed.train() == 0


def test_an_evaluation_that_was_stopped_is_made_when_the_run_goes_on(tmp_path: Path) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    trainer = trainer_for(eval_every=1, iterations=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(on_evaluation=stop)
    trainer.save(tmp_path / "run")
    resumed = trainer_for(eval_every=1, iterations=1)
    resumed.load(tmp_path / "run")
    judged: list[int] = []
    resumed.train(on_evaluation=lambda _: judged.append(resumed.iteration))
    assert judged == [0, 1]


def test_what_may_change_when_a_run_goes_on_changes(tmp_path: Path) -> None:
    trainer = trainer_for()
    trainer.train_iteration()
    trainer.save(tmp_path / "run")
    ppo = replace(
        trainer.config.ppo,
        policy_learning_rate=7e-4,
        value_learning_rate=8e-4,
        betas=(0.8, 0.9),
        weight_decay=0.5,
        adam_eps=1e-7,
    )
    resumed = trainer_for(ppo=ppo, iterations=9, eval_samples=4)
    resumed.load(tmp_path / "run")
    policy = resumed.learner.policy_update.optimizer.param_groups[0]
    assert policy["lr"] == 7e-4
    assert (policy["betas"], policy["weight_decay"], policy["eps"]) == ((0.8, 0.9), 0.5, 1e-7)
    assert resumed.learner.critic_update is not None
    critic = resumed.learner.critic_update.optimizer.param_groups[0]
    assert (critic["lr"], critic["betas"], critic["weight_decay"]) == (8e-4, (0.8, 0.9), 0.5)
    moments = trainer.learner.policy_update.optimizer.state_dict()["state"][0]
    found = resumed.learner.policy_update.optimizer.state_dict()["state"][0]
    assert all(torch.equal(moments[name], found[name]) for name in moments)
    resumed.train_iteration()
    assert float(policy["lr"]) == 7e-4


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (
            {"seed": 1},
            Refusal(
                "seed was 0 and is 1 now",
                cause="A run goes on from a checkpoint with another seed.",
                remedy="take the old value, or start another run",
            ),
        ),
        (
            {"batch_size": 16, "samples_per_prompt": 2},
            Refusal(
                "batch_size was 8 and is 16 now; samples_per_prompt was 1 and is 2 now",
                cause="A run goes on with another number of trajectories per rollout.",
                remedy="take the old value, or start another run",
            ),
        ),
        (
            {"sampler": SamplerConfig(num_steps=4, noise_level=0.5)},
            Refusal(
                "sampler.noise_level was 0.7 and is 0.5 now",
                cause="A run goes on with another sampler, whose states its critic does not know.",
                remedy="take the old value, or start another run",
            ),
        ),
        (
            {"critic": CriticConfig(hidden_dim=32, head_dim=8, num_heads=2)},
            Refusal(
                "critic.hidden_dim was 16 and is 32 now",
                cause="A run goes on with a critic of another shape.",
                remedy="take the old value, or start another run",
            ),
        ),
    ],
)
def test_what_must_stay_when_a_run_goes_on_is_refused_with_both_values(
    saved_run: Path, change: dict[str, Any], refusal: Refusal
) -> None:
    trainer = trainer_for(model_seed=1, **change)
    before = weights(trainer)
    with refusal.raised():
        trainer.load(saved_run)
    assert not changed(before, weights(trainer))
    assert trainer.iteration == 0


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "run"
    trainer = trainer_for()
    trainer.train_iteration()
    trainer.save(directory)
    return directory


def test_other_reward_weights_are_refused(saved_run: Path) -> None:
    trainer = LatentActorCriticTrainer(tiny_backbone("dit"), {brightness: 2.0}, PROMPTS, tiny_config())
    with Refusal(
        "was trained on rewards {'brightness': 1.0}, this trainer has {'brightness': 2.0}",
        cause="A run goes on with other rewards or weights.",
        remedy="use the same",
    ).raised():
        trainer.load(saved_run)


def test_an_optimizer_of_other_parameters_is_refused_before_a_weight_changes(saved_run: Path) -> None:
    trainer = trainer_for(model_seed=1)
    before = weights(trainer)
    frozen = next(trainer.backbone.model.parameters())
    optimizer = trainer.learner.policy_update.optimizer
    group = optimizer.param_groups[0]
    group["params"] = [parameter for parameter in group["params"] if parameter is not frozen]
    with pytest.raises(ValueError, match="the optimizer of the policy does not fit: group 0"):
        trainer.load(saved_run)
    assert not changed(before, weights(trainer))


def test_a_damaged_checkpoint_changes_nothing(saved_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved_run, tmp_path / "run")
    weight = copy / "critic.safetensors"
    weight.write_bytes(weight.read_bytes()[:-1])
    trainer = trainer_for(model_seed=1)
    before = weights(trainer)
    with pytest.raises(DamagedError, match=r"critic\.safetensors has"):
        trainer.load(copy)
    # Without checksums.
    (copy / MANIFEST).unlink()
    with Refusal(
        "is damaged: its weights cannot be read",
        cause="The weights of a checkpoint without checksums are cut off.",
        remedy="go on from the checkpoint before it",
        error=DamagedError,
    ).raised():
        trainer.load(copy)
    state = copy / "trainer.pt"
    state.write_bytes(state.read_bytes()[:100])
    with Refusal(
        "is damaged: trainer.pt cannot be read",
        cause="The state of a checkpoint without checksums is cut off.",
        remedy="go on from the checkpoint before it",
        error=DamagedError,
    ).raised():
        trainer.load(copy)
    assert not changed(before, weights(trainer))


def test_a_signal_within_an_update_waits_for_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer, through = trainer_for(), trainer_for()
    learn = trainer.learner.learn

    def interrupted(*arguments: Any) -> dict[str, Any]:
        signal.raise_signal(signal.SIGINT)
        return learn(*arguments)

    monkeypatch.setattr(trainer.learner, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_iteration()
    through.train_iteration()
    assert not changed(weights(trainer), weights(through))
    assert trainer.iteration == 1
    trainer.save(tmp_path / "run")


def test_an_update_that_was_cut_off_is_not_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = trainer_for()

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.learner, "learn", cut)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_iteration()
    with Refusal(
        "an update was cut off",
        cause="`save` after an error or a second Ctrl-C within an update.",
        remedy="load the checkpoint of iteration 0 or one before it",
    ).raised():
        trainer.save(tmp_path / "run")


def test_an_average_of_the_weights_is_evaluated_saved_and_left_out_of_training(tmp_path: Path) -> None:
    trainer, plain = trainer_for(ema_decay=0.5), trainer_for()
    start = weights(trainer)
    for one in (trainer, plain):
        one.train_iteration()
    assert not changed(weights(trainer), weights(plain))
    own = weights(trainer)
    with trainer.averaged():
        averaged = weights(trainer)
    name = "proj_out.weight"
    torch.testing.assert_close(averaged[name], (start[name] + own[name]) / 2)
    assert not changed(own, weights(trainer))
    assert not torch.equal(trainer.evaluate().images, plain.evaluate().images)
    trainer.save(tmp_path / "run")
    resumed = trainer_for(model_seed=1, ema_decay=0.5)
    resumed.load(tmp_path / "run")
    with resumed.averaged():
        assert not changed(averaged, weights(resumed))


def test_a_run_saved_on_a_gpu_goes_on_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainer_for()
    trained.train_iteration()
    # What torch writes beside a storage that lies on a device.
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    trained.save(tmp_path / "run")
    monkeypatch.undo()
    resumed = trainer_for()
    resumed.load(tmp_path / "run")
    assert resumed.train_iteration()["policy_loss"] == trained.train_iteration()["policy_loss"]


def test_saving_twice_replaces_the_checkpoint_and_leaves_no_temporary(tmp_path: Path) -> None:
    trainer = trainer_for()
    trainer.save(tmp_path / "run")
    trainer.save(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_of_another_shape_changes_nothing(tmp_path: Path) -> None:
    trainer_for(critic=CriticConfig(hidden_dim=32)).save(tmp_path / "run")
    trainer = trainer_for(model_seed=1)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"critic\.hidden_dim was 32 and is 16 now"):
        trainer.load(tmp_path / "run")
    assert not changed(before, weights(trainer))
    with pytest.raises(ValueError, match=r"holds no trainer\.pt"):
        trainer.load(tmp_path)


def test_metrics_are_json_lines(tmp_path: Path) -> None:
    trainer = LatentActorCriticTrainer(
        tiny_backbone("dit"), brightness, PROMPTS, tiny_config(), metrics_path=tmp_path / "metrics.jsonl"
    )
    trainer.train(1)
    trainer.evaluate()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["train", "evaluate"]
    assert [math.isnan(share) for share in lines[0]["clip_fraction_high"]] == [False, False, False, True]
    (calibration,) = (lines[1][name] for name in lines[1] if name.startswith("calibration/"))
    values, returns, errors = calibration
    assert len(values) == len(returns) == len(errors) == 10
    assert values == sorted(values)


def test_evaluation_repeats_exactly_and_does_not_train() -> None:
    trainer = trainer_for()
    before = weights(trainer)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert torch.equal(first.images, second.images)
    assert not changed(before, weights(trainer))


def failing(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
    return torch.full((len(prompts),), torch.nan)


def test_a_failed_reward_raises_and_keeps_the_rollout() -> None:
    trainer = trainer_for(reward=failing)
    before = weights(trainer)
    with pytest.raises(RewardError, match="reward 'failing' returned nan"):
        trainer.train_iteration()
    assert trainer.last_rollout is not None
    assert trainer.last_rollout.batch_size == 8
    assert not changed(before, weights(trainer))


def test_a_failed_reward_is_never_trained_on_when_skipping() -> None:
    trainer = trainer_for(reward=failing, on_reward_error="skip")
    before = weights(trainer)
    with pytest.warns(UserWarning, match="rollout of 8 images skipped: reward 'failing'"):
        metrics = trainer.train_iteration()
    assert metrics["skipped"]
    assert not changed(before, weights(trainer))


@pytest.mark.filterwarnings("ignore:rollout of 8 images skipped")
def test_a_reward_that_always_fails_ends_the_run_when_skipping() -> None:
    works = iter([False] * 4 + [True] + [False] * 9)

    def sometimes(images: torch.Tensor, *_: Any) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3)) if next(works) else failing(images, [""] * len(images), [])

    trainer = trainer_for(reward=sometimes, on_reward_error="skip")
    with Refusal(
        "the rewards of 5 rollouts in a row failed, so nothing is learned",
        cause='on_reward_error="skip" with a reward that always fails.',
        remedy="mend the cause and go on",
        error=RewardError,
    ).raised():
        trainer.train(20)
    assert trainer.iteration == 9


def test_an_evaluation_that_fails_is_neither_better_nor_worse_when_skipping(tmp_path: Path) -> None:
    calls: list[int] = []

    def moody(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> torch.Tensor:
        calls.append(len(prompts))
        # Evaluation, rollout, evaluation, rollout, evaluation.
        return images.mean(dim=(1, 2, 3)) if len(calls) != 3 else torch.full((len(prompts),), torch.nan)

    trainer = LatentActorCriticTrainer(
        tiny_backbone("dit"),
        moody,
        PROMPTS,
        tiny_config(on_reward_error="skip", eval_every=1, early_stopping=EarlyStoppingConfig(patience=2)),
        metrics_path=tmp_path / "metrics.jsonl",
    )
    seen: list[Evaluation] = []
    with pytest.warns(UserWarning, match="evaluation of iteration 1 skipped: reward 'moody' returned nan"):
        assert trainer.train(2, on_evaluation=seen.append) == 2
    first, last = (evaluation.means()["moody"] for evaluation in seen)
    assert trainer.early_stopping.best == max(first, last)
    assert trainer.early_stopping.evaluations_since_best == int(last <= first)
    trainer.close()
    phases = [json.loads(line)["phase"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert phases == ["evaluate", "train", "skipped_evaluation", "train", "evaluate"]


def test_prompts_and_settings_that_a_script_replaces_are_those_that_are_drawn() -> None:
    trainer = trainer_for()
    trainer.held_out = PromptSet.create(["three red circles"])
    trainer.config = replace(trainer.config, eval_samples=3)
    assert trainer.evaluate().prompts == ["three red circles"] * 3


def test_a_failed_evaluation_ends_a_run_that_does_not_skip() -> None:
    trainer = trainer_for(reward=failing, eval_every=1)
    with pytest.raises(RewardError, match="reward 'failing' returned nan"):
        trainer.evaluate()


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    trainer = trainer_for(on_bad_gradient="raise")
    rollout = trainer.collect(trainer.prompts, 0)
    assert rollout is not None
    before = weights(trainer)
    poisoned = replace(rollout, model_outputs=torch.full_like(rollout.model_outputs, torch.inf))
    with Refusal(
        "the gradient norm of the policy is",
        cause="A loss that is no longer finite.",
        remedy="check the rewards, or set on_bad_gradient='skip'",
        error=FloatingPointError,
    ).raised():
        trainer.update(poisoned)
    assert not changed(before, weights(trainer))


@pytest.mark.parametrize(
    ("sampler", "refused"),
    [
        (
            SamplerConfig(num_steps=4, noise_level=0.0),
            Refusal(
                "noise_level=0.0 and window=None makes every step deterministic",
                cause="A sampler without noise: no step has a log-prob.",
                remedy="use noise_level > 0",
            ),
        ),
        (
            SamplerConfig(num_steps=4, kind="ode", noise_level=0.0),
            Refusal(
                "kind='ode' with noise_level=0.0",
                cause="Training with the sampler of evaluations.",
                remedy="0.7 for 'flow_sde'",
            ),
        ),
    ],
)
def test_a_sampler_that_cannot_train_is_refused(sampler: SamplerConfig, refused: Refusal) -> None:
    with refused.raised():
        trainer_for(sampler=sampler)


def test_a_critic_that_is_not_the_configured_one_is_refused() -> None:
    backbone = tiny_backbone("dit")
    LatentActorCriticTrainer(backbone, brightness, PROMPTS, tiny_config())
    with pytest.raises(ValueError, match=r"critic has 1 heads .*; 2 rewards \['brightness', 'shapes_h"):
        LatentActorCriticTrainer(backbone, [brightness, "shapes_height"], PROMPTS, tiny_config())
    with pytest.raises(ValueError, match=r"trunk='copy'.* do not fit it.*backbone\.critic = None"):
        LatentActorCriticTrainer(
            backbone, brightness, PROMPTS, tiny_config(critic=CriticConfig(trunk="copy"))
        )
    with pytest.raises(ValueError, match=r"critic is of rewards \['brightness'\].*backbone\.critic = None"):
        LatentActorCriticTrainer(backbone, "shapes_height", PROMPTS, tiny_config())


def test_several_rewards_train_one_head_each() -> None:
    trainer = LatentActorCriticTrainer(
        tiny_backbone("dit"), {brightness: 1.0, "shapes": 2.0}, _prompts(), tiny_config()
    )
    metrics = trainer.train_iteration()
    assert len(metrics["advantage_correlation"]) == 2
    assert trainer.critic is not None
    assert trainer.critic.num_rewards == 2


def _prompts() -> Any:
    from lacfast.tasks import scenes

    return scenes.TASK.split()[0]


@pytest.mark.parametrize(
    ("ppo", "refusal"),
    [
        (
            {"num_minibatches": 25},
            Refusal(
                "num_minibatches=25 cannot be made of the 24 (sample, step) pairs of a pass",
                cause="More optimizer steps per pass than a rollout has trained pairs.",
                remedy="lower it, or raise batch_size or timestep_fraction",
            ),
        ),
        (
            {"critic_minibatches": 33},
            Refusal(
                "critic_minibatches=33 cannot be made of the 32 (sample, step) pairs of a pass",
                cause="More optimizer steps of the critic per pass than a rollout has states.",
                remedy="lower it, or raise batch_size or timestep_fraction",
            ),
        ),
    ],
)
def test_more_minibatches_than_pairs_are_refused_before_any_work(
    ppo: dict[str, int], refusal: Refusal
) -> None:
    with refusal.raised():
        tiny_config(ppo=PPOConfig(**ppo))
