"""One training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from lacfast.config.advantages import AdvantageConfig, GroupBaseline
from lacfast.config.checks import (
    Config,
    Count,
    CountOrNone,
    OneOf,
    Positive,
    Range,
    Seed,
    require,
)
from lacfast.config.critic import WEIGHTLESS_TRUNKS, CriticConfig
from lacfast.config.graph import GraphConfig
from lacfast.config.objective import PPO, ForwardProcess, Objective
from lacfast.config.ppo import PPOConfig
from lacfast.config.sampling import Random, SamplerConfig, Sliding
from lacfast.config.unread import Unread


@dataclass(frozen=True, kw_only=True)
class ValuePretrainingConfig(Config):
    """Value pretraining: the actor is frozen, the critic learns Monte-Carlo returns."""

    UNREAD = (
        Unread(
            options=("bound_states",),
            where=lambda pretrain: pretrain.completions == 0,
            because=lambda pretrain: ": completions=0 measures no bounds",
        ),
    )

    iterations: Count = 15
    """Rollouts. [paper] about 15, more is worse."""
    kept_rollouts: Count = 15
    """Rollouts to learn from, the latest; the actor is frozen, so old ones stay true. They lie in the host's
    memory. [paper] 3."""
    passes: Positive = 0.5
    """Passes over the kept states per iteration."""
    minibatch_size: Count = 256
    """(sample, step) pairs per optimizer step."""
    held_out_samples: CountOrNone = 512
    """Trajectories on held-out prompts that choose when to stop and which critic is kept. 0: every rollout
    measures the critic before it learns from it, and the last critic is kept; no image is spent."""
    patience: Count = 4
    """Iterations without a better explained variance before it stops."""
    stop_score: Annotated[float, Range(off=math.inf)] = math.inf
    """Overall score at which it stops, 0 at the prompts' floor and 1 at the states' ceiling, see
    lacfast.learning.value_bounds. inf: patience alone."""
    completions: CountOrNone = 0
    """Branched completions of each state that measure the ceiling, at least 2; their images count. 0: neither
    floor nor ceiling is measured."""
    bound_states: Annotated[int, Range(least=2)] = 64
    """States per measured step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.completions == 0 or self.completions >= 2,
            f"completions={self.completions} must be at least 2 to be compared (0: no bounds)",
        )
        require(
            self.completions == 0 or self.held_out_samples > 0,
            f"completions={self.completions} are those of held-out states; set held_out_samples",
        )
        require(
            self.completions > 0 or math.isinf(self.stop_score),
            f"stop_score={self.stop_score} needs floor and ceiling; set completions, for example 4",
        )


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig(Config):
    """When a run ends before its last iteration; the run's directory keeps the best weights."""

    patience: CountOrNone = 0
    """Evaluations without a better score before it stops; 0: never."""
    score: str = ""
    """A reward or an evaluation reward (a gold score shows hacking). Empty: the first reward."""


_CRITIC_OPTIONS = (
    *("ppo.gae_lambda", "ppo.lambda_gate", "ppo.target_clip", "ppo.critic_minibatches"),
    *("ppo.critic_rollouts", "ppo.value_learning_rate", "ppo.trunk_learning_rate"),
    *("ppo.final_value_learning_rate", "pretrain"),
)
"""What only a critic reads."""
_RATIO_OPTIONS = (
    *("ppo.clip", "ppo.dual_clip", "ppo.ratio", "ppo.kl_limit", "ppo.balance_steps"),
    *("ppo.hold", "ppo.gae_lambda", "ppo.lambda_gate"),
)
"""What only a likelihood ratio along a chain reads."""
ROLLOUT_PRECISIONS = ("model", "fp8", "fp8_weights")
"""What a rollout's policy computes in; see TrainConfig.rollout_precision."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """One training run."""

    UNREAD = (
        Unread(
            options=_CRITIC_OPTIONS,
            where=lambda train: train.critic.trunk == "none" and not train.advantages.uses_critic,
            because=lambda train: f": advantages.estimator={train.advantages.estimator} has no critic",
        ),
        Unread(
            options=_RATIO_OPTIONS,
            where=lambda train: isinstance(train.objective, ForwardProcess),
            because=lambda train: f": objective={train.objective} has no ratio and no chain",
            remedy="use objective=PPO()",
        ),
        Unread(
            options=("ppo.trunk_learning_rate",),
            where=lambda train: train.critic.trunk in WEIGHTLESS_TRUNKS,
            because=lambda train: f": critic.trunk={train.critic.trunk!r} has no weights of its own",
        ),
        Unread(
            options=("ppo.critic_rollouts", "ppo.critic_minibatches"),
            where=lambda train: not train.critic.keep_features,
            because=lambda train: ": with keep_features=False the critic learns in the policy's steps",
            remedy="use keep_features=True",
        ),
        Unread(
            options=("shard_gradients",),
            where=lambda train: train.shard == 1,
            because=lambda train: ": shard=1 divides nothing",
            remedy="set shard",
        ),
        Unread(
            options=("graph.warmup_steps", "graph.strict"),
            where=lambda train: train.shard > 1,
            because=lambda train: f": shard={train.shard} captures nothing",
        ),
        Unread(
            options=("ppo.cfg_grad",),
            where=lambda train: train.sampler.guidance_scale == 1,
            because=lambda train: ": guidance_scale=1 runs without the unconditional half",
        ),
    )
    seed: Seed = 0
    """Seed of noise, prompts and initial weights."""
    batch_size: Count = 128
    """Trajectories per rollout, one per prompt draw."""
    rollout_batch_size: CountOrNone = 0
    """Trajectories sampled at a time; the rewards of one part are computed while the next is sampled. Bounds
    memory, does not change the result. 0: the whole rollout at once."""
    samples_per_prompt: Count = 1
    """Consecutive trajectories that share a prompt; 1 for the critic, a group for group-relative methods."""
    iterations: Count = 300
    """Rollout and update cycles. [paper] 300."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    objective: Objective = field(default_factory=PPO)
    """What the policy learns by. "ppo": the ratio of the rollout's stochastic transitions; "nft" and "awm": a
    loss on its clean latents noised anew, from any sampler, see docs/objectives.md."""
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Trunk "none" where the advantages need no critic."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    pretrain: ValuePretrainingConfig = field(default_factory=ValuePretrainingConfig)
    ema_decay: Annotated[float, Range(least=0, below=1)] = 0.0
    """Decay per iteration of the average of the policy's weights that evaluation uses; 0 keeps none."""
    graph: GraphConfig = field(default_factory=GraphConfig)
    """Capture of the steps of sampling and update, see lacfast.runtime.graph."""
    gradient_checkpointing: bool = False
    """Recompute activations of the update instead of keeping them; bounds memory, costs a forward."""
    compile: bool = False
    """torch.compile the blocks that model and critic repeat. The first iteration and the first
    evaluation then wait for the compiler, seconds to minutes per kind of block."""
    staleness: Annotated[int, Range(least=0, most=2)] = 0
    """Updates that the policy of a rollout has not seen: rollout i is of the policy after i - staleness of
    them, and can be sampled while others are learned from. The ratio is the exact one to that policy.
    arXiv 2410.18252: 1."""
    rollout_ranks: CountOrNone = 0
    """Ranks of torchrun, the last ones, that sample while the others learn; 0: all do both, in turn. Without
    staleness one group waits while the other works. The run is the same with any number of them."""
    shard: Count = 1
    """Ranks that weights are divided over, with gradients and moments: those of the model, the critic's own
    blocks and the anchor's copy. It divides the number of ranks. 1: every rank has all of them."""
    shard_gradients: bool = False
    """Sum gradients over the shards behind every microbatch, so that a rank keeps its part of them alone.
    False: a rank keeps them whole until the last microbatch, and they are sent once."""
    rollout_precision: Annotated[str, OneOf(ROLLOUT_PRECISIONS)] = "model"
    """Precision of the policy that samples rollouts. "model": its own; "fp8": its blocks in float8, on Ada,
    Hopper and later; "fp8_weights": their weights alone, on any device, slower. The ratio is then the exact
    one to the quantised policy, and the distance is logged. Needs lacfast[fp8]. Evaluation does without."""
    eval_every: CountOrNone = 0
    """Iterations between evaluations on held-out prompts; 0: only when asked."""
    eval_samples: Count = 1024
    """Images per evaluation; below about 1000 rankings flip."""
    eval_batch_size: Count = 256
    """Images per batch of an evaluation."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    eval_sampler: SamplerConfig | None = None
    """How evaluation samples, e.g. kind "ode" with noise_level 0 and more steps. None: as training does."""
    on_reward_error: Annotated[str, OneOf(("raise", "skip"))] = "raise"
    """"raise": a reward that fails, or images of NaN, end the run, the rollout stays in trainer.last_rollout;
    "skip": the rollout is dropped with a warning and never trained on; of an evaluation there is a line of
    phase "skipped_evaluation" in the log, and neither early stopping nor the best checkpoint takes note."""

    on_bad_gradient: Annotated[str, OneOf(("skip", "raise"))] = "skip"
    """"skip": an optimizer step whose gradient is not finite is left out and counted in the log; after five
    in a row the learning rate is halved, once, and after five more the run ends. "raise": the first ends the
    run, and one that goes on from the checkpoint meets it again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.batch_size % self.samples_per_prompt == 0,
            f"batch_size={self.batch_size} must be a multiple of "
            f"samples_per_prompt={self.samples_per_prompt}",
        )
        require(
            self.critic.loss != "bce" or math.isinf(self.ppo.target_clip),
            f"target_clip={self.ppo.target_clip} would cut a rare 1 out of the targets of loss='bce'; "
            "set PPOConfig(target_clip=math.inf)",
        )
        if self.rollout_precision != "model":
            self._require_exact_correction()
        self._require_fitting_objective()
        self._require_fitting_rollouts()
        self._require_fitting_shards()
        self._require_fitting_advantages()
        self._require_fitting_replay()
        self._require_enough_pairs()
        if self.ppo.hold is not None:
            steps, trained = self.sampler.num_steps, self._steps_per_rollout
            self.ppo.require_pairs_to_hold(steps, trained, batch_size=self.batch_size, shard=self.shard)
        require(
            self.eval_sampler is None or not self.eval_sampler.moves,
            f"eval_sampler.window={self.eval_sampler and self.eval_sampler.window} would be ignored: an "
            "evaluation has one window; use Fixed((start, stop)) or None",
        )
        require(
            self.early_stopping.patience == 0 or self.eval_every > 0,
            f"early_stopping.patience={self.early_stopping.patience} counts evaluations, and eval_every=0 "
            "makes none; set eval_every",
        )

    def _require_fitting_shards(self) -> None:
        if self.shard == 1:
            return
        mode, precision = self.graph.mode, self.rollout_precision
        require(
            mode in ("auto", "off"),
            f"graph.mode={mode!r} would freeze where weights are gathered to, and shard={self.shard} gathers "
            "them anew in every forward; use graph.mode='auto', which captures nothing then, or shard=1",
        )
        require(
            self.staleness == 0 and self.rollout_ranks == 0,
            f"staleness={self.staleness} and rollout_ranks={self.rollout_ranks} keep and send whole weights, "
            f"and shard={self.shard} has them in parts; use staleness=0 and rollout_ranks=0, or shard=1",
        )
        require(
            self.ppo.moments == "float32",
            f"ppo.moments={self.ppo.moments!r} makes blocks of whole weights, and shard={self.shard} has "
            "them in parts, moments too; use ppo.moments='float32' or shard=1",
        )
        require(
            precision == "model",
            f"rollout_precision={precision!r} keeps a quantised copy of all weights on every rank, and "
            f"shard={self.shard} is for those that do not fit; use rollout_precision='model' or shard=1",
        )

    def _require_fitting_advantages(self) -> None:
        estimator, trunk = self.advantages.estimator, self.critic.trunk
        if self.advantages.uses_critic:
            require(
                trunk != "none",
                f"advantages.estimator={estimator} needs a critic, and critic.trunk is 'none'; choose a "
                "trunk, or advantages=AdvantageConfig(estimator=GRPO())",
            )
        else:
            require(
                trunk == "none",
                f"advantages.estimator={estimator} trains without a critic, so critic.trunk={trunk!r} would "
                "be ignored; use critic=CriticConfig(trunk='none')",
            )
        require(
            not isinstance(estimator, GroupBaseline) or self.samples_per_prompt > 1,
            f"advantages.estimator={estimator} compares the trajectories of one prompt, and "
            f"samples_per_prompt={self.samples_per_prompt} makes one; set 2 or more, or estimator=DDPO()",
        )

    def _require_fitting_objective(self) -> None:
        objective, ppo = self.objective, self.ppo
        if not isinstance(objective, ForwardProcess):
            return
        last = self.sampler.num_steps
        require(
            objective.steps is None or objective.steps[1] <= last,
            f"objective={objective} trains steps that a sampler of {last} does not have; use steps within "
            f"(0, {last}) or raise sampler.num_steps",
        )
        require(
            math.isfinite(ppo.advantage_clip),
            f"objective={objective} weighs by advantage / advantage_clip, and ppo.advantage_clip is inf; set "
            "it, DiffusionNFT and AWM have 5",
        )
        require(
            ppo.kl is None or ppo.kl.kind == "velocity",
            f"ppo.kl={ppo.kl} measures transitions, and objective={objective} has none; use "
            "kind='velocity', the squared distance of the outputs",
        )
        unchanged = {"staleness": 0, "rollout_ranks": 0, "rollout_precision": "model", "shard": 1}
        for name, value in unchanged.items():
            found = getattr(self, name)
            require(
                found == value,
                f"{name}={found!r} is for rollouts by other weights or ranks than those that learn, and "
                f"objective={objective} has an old policy with whole weights here; use {name}={value!r} or "
                "objective=PPO()",
            )
        require(
            self.pretrain.completions == 0,
            f"pretrain.completions={self.pretrain.completions} go on along a chain, and objective="
            f"{objective} values latents that are noised anew; use completions=0",
        )

    def _require_fitting_rollouts(self) -> None:
        require(
            self.staleness == 0 or self.ppo.ratio == "innovation",
            f"ratio={self.ppo.ratio!r} is no likelihood ratio, so it cannot correct for a policy that is "
            f"staleness={self.staleness} updates behind; use ratio='innovation' or staleness=0",
        )
        require(
            self.rollout_ranks == 0 or self.critic.keep_features or self.critic.trunk == "none",
            "keep_features=False has states valued while they are sampled, and "
            f"rollout_ranks={self.rollout_ranks} leaves that to the ranks that learn; use keep_features=True "
            "or rollout_ranks=0",
        )

    def _require_fitting_replay(self) -> None:
        rollouts = self.ppo.critic_rollouts
        require(
            rollouts == 1 or math.isinf(self.critic.value_clip),
            f"value_clip={self.critic.value_clip} bounds a value's move from that of its own rollout, and "
            f"critic_rollouts={rollouts} draws from older ones; use value_clip=math.inf",
        )

    @property
    def _steps_per_rollout(self) -> int:
        """Steps of a rollout that the policy learns from."""
        if isinstance(self.objective, ForwardProcess):
            return len(self.objective.forward_steps(self.sampler.num_steps))
        (start, stop), window = self.sampler.stochastic_window, self.sampler.window
        return window.size if isinstance(window, Random | Sliding) else stop - start

    def _require_enough_pairs(self) -> None:
        pairs = math.ceil(self.ppo.timestep_fraction * self.batch_size * self._steps_per_rollout)
        states = self.batch_size * self.sampler.num_steps
        for name, available in (("num_minibatches", pairs), ("critic_minibatches", states)):
            asked = getattr(self.ppo, name)
            require(
                asked <= available or (name == "num_minibatches" and pairs == 0),
                f"{name}={asked} cannot be made of the {available} (sample, step) pairs of a pass; lower it, "
                "or raise batch_size or timestep_fraction",
            )

    def _require_exact_correction(self) -> None:
        """Refuse what a quantised rollout would make wrong without a word."""
        precision = self.rollout_precision
        require(
            self.ppo.ratio == "innovation",
            f"ratio={self.ppo.ratio!r} is no likelihood ratio, so it cannot correct for the quantised policy "
            f"of rollout_precision={precision!r}; use ratio='innovation' or rollout_precision='model'",
        )
        require(
            self.critic.trunk not in ("joint", "lora"),
            f"trunk={self.critic.trunk!r} reads the policy's weights in the update and quantised ones in the "
            f"rollout under rollout_precision={precision!r}; use 'branch' or 'shared', which learn on the "
            "rollout's own features, 'copy', or rollout_precision='model'",
        )
        require(
            self.critic.keep_features or self.critic.trunk == "none",
            "keep_features=False lets the critic learn on features of the policy and value those of its "
            f"quantised form under rollout_precision={precision!r}; use keep_features=True",
        )
