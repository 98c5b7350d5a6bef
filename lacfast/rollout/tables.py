"""The transition tables of a run: one for every place of a stochastic window that may move."""

from __future__ import annotations

from lacfast.backbone import Backbone
from lacfast.config import ForwardProcess, SamplerConfig, TrainConfig
from lacfast.records import TransitionTable


class TrainingTables:
    """Which steps are stochastic in which iteration, as a function of seed and iteration.

    The tables are made once, so that a place that comes back has the same record as before.
    """

    def __init__(
        self, backbone: Backbone, sampler: SamplerConfig, *, seed: int, trains_chains: bool = True
    ) -> None:
        """
        Args:
            backbone: whose scheduler they are of.
            sampler: of the run.
            seed: of the run.
            trains_chains: False where no step needs a log-prob.

        Raises:
            ValueError: for a place of the window without a stochastic step, which has nothing to train.
        """
        self.sampler = sampler
        self.seed = seed
        self.whole = backbone.transition_table(sampler)
        """The table with all of the window stochastic, for evaluation and steering."""
        self._places = {
            place: backbone.transition_table(place) if sampler.moves else self.whole
            for place in sampler.places
        }
        for place, table in self._places.items():
            if trains_chains and not table.trainable_steps:
                raise ValueError(
                    f"kind={place.kind!r} with noise_level={place.noise_level} and window={place.window} "
                    "makes every step deterministic, so no step has a log-prob to train; use noise_level > 0 "
                    "(0.7 for 'flow_sde') and a window that ends before a last step without noise"
                )

    @staticmethod
    def of(backbone: Backbone, config: TrainConfig) -> TrainingTables:
        """The tables of a run; a loss on the forward process asks for no stochastic step."""
        trains_chains = not isinstance(config.objective, ForwardProcess)
        return TrainingTables(backbone, config.sampler, seed=config.seed, trains_chains=trains_chains)

    def at(self, iteration: int) -> TransitionTable:
        """The table of an iteration's rollout."""
        return self._places[self.sampler.at(iteration, seed=self.seed)]

    def pretraining(self, iteration: int) -> TransitionTable:
        """The same for value pretraining, which is short and meets every place of a sliding window."""
        return self.at(iteration * self.sampler.iterations_per_place)
