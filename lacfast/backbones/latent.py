"""What all backbones share: prompts, decoding, schedule, the trained weights and their dtype.

Dtypes: latents and steps are float32. Trained weights are float32, frozen ones have `dtype`, and the model
runs in `dtype`: a frozen base by its weights (LoRA casts its own where they are used), a trained one under
autocast. Outside `predict` and the critic's trunk no autocast is on.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lacfast import schedule
from lacfast.backbones import lora as adapters
from lacfast.backbones.attention import attention_signature
from lacfast.backbones.casting import cast_weights
from lacfast.backbones.checkpointing import checkpoint_blocks
from lacfast.backbones.compilation import compile_blocks
from lacfast.backbones.estimate_trunks import CleanEstimate, CleanNetTrunk
from lacfast.backbones.int8 import is_quantized
from lacfast.backbones.masters import MasterRMSNorm
from lacfast.backbones.parts import Embeddings, LatentCodec, PromptEncoder
from lacfast.backbones.prompt_cache import PromptCache
from lacfast.backbones.prompt_trunks import PromptTap
from lacfast.backbones.quantization import QUANTIZERS, QuantizedLinears, quantized_copy
from lacfast.backbones.scheduler_choice import is_flow
from lacfast.backbones.schedulers import from_scheduler
from lacfast.backbones.trunks import CopyTrunk, LoRATrunk, SharedTrunk
from lacfast.checkpoint import load_in_place
from lacfast.config import TAPPED_TRUNKS, CriticConfig, LoRAConfig, SamplerConfig
from lacfast.config.critic import WEIGHTLESS_TRUNKS
from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Trunk, registered_trunk
from lacfast.distributed.sharding import Divider, Divisible
from lacfast.ops.checks import arithmetic_dtype
from lacfast.records import Conditioning, TransitionTable
from lacfast.runtime.memory import BatchSize
from lacfast.runtime.precision import running_in
from lacfast.transfer import to_device


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class Storage(Protocol):
    """A format: what is written beside the critic and the trainer's state."""

    def weights(self, backbone: LatentBackbone) -> dict[str, Tensor]:
        """The live weights that are written."""

    def write(self, backbone: LatentBackbone, directory: Path, weights: dict[str, Tensor]) -> None:
        """Write the backbone into an existing directory, with these weights, none of them sharded."""

    def read(self, backbone: LatentBackbone, directory: Path) -> dict[str, Tensor]:
        """The `policy_state` that `write` left there."""


class LatentBackbone(ABC):
    """A diffusers model with its prompt encoder and latent codec.

    A family says how its model is called and cut.
    """

    lora_targets: ClassVar[tuple[str, ...]]
    """Ends of the names of the modules that LoRA adapts by default: the attention's projections."""
    repeated_blocks: ClassVar[tuple[str, ...]]
    """Classes of the blocks that the model repeats, which `compile_blocks` compiles."""
    prompt_arguments: ClassVar[tuple[str, ...]]
    """What the model is told of a prompt, by its forward's names."""
    rescales_guidance: ClassVar[bool] = False
    judged_frames = 0
    """See the protocol for both."""

    def __init__(
        self,
        model: Any,
        prompt_encoder: PromptEncoder,
        codec: LatentCodec,
        *,
        latent_shape: tuple[int, ...],
        storage: Storage,
        scheduler: Any = None,
        lora: LoRAConfig | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            model: the family's diffusers model, which gets the adapter and its dtype in place.
            prompt_encoder: text to embeddings; frozen.
            codec: latents to images; frozen.
            latent_shape: (C, H, W), (C, F, H, W) of videos, or (L, D) for packed latents.
            storage: how it is written.
            scheduler: a diffusers scheduler that gives the noise levels. None: flow matching with
                SamplerConfig.shift.
            lora: train this adapter and freeze the rest. None: train all weights.
            dtype: that the model runs in. None: the model's.
        """
        adapters.require_none(model)
        self.dtype: torch.dtype = dtype or model.dtype
        self.lora = lora
        self.model = model.eval().requires_grad_(False)
        weights_dtype = torch.float32 if lora is None else self.dtype
        if model.dtype != weights_dtype:
            cast_weights(model, weights_dtype)
        self.prompts = PromptCache(prompt_encoder)
        self.codec = codec
        self.latent_shape = latent_shape
        self.latent_maps: Callable[[Tensor], Tensor] = _unchanged
        """Maps (B, C, H, W) or (B, C, F, H, W) of latents (B, ...); a family that packs them unpacks."""
        self.prediction: Callable[[Tensor], Tensor] = _unchanged
        """The output (B, ...) that a step takes, of what the model gives."""
        self.storage = storage
        self.scheduler = scheduler
        self.critic: Critic | None = None
        self.continues_lora = False
        """Whether the LoRA was trained before."""
        self._adapter: str | None = adapters.POLICY
        """The adapter that `predict` runs with, where there is a LoRA."""
        self._compilation: tuple[str, str | None] | None = None
        self._precision = "model"
        self._quantized: QuantizedLinears | None = None
        # Of videos one fills a decoder, which goes through its frames one after the other.
        at_a_time, unit = (1, "video") if len(latent_shape) == 4 else (0, "image")
        self._decoding = BatchSize(at_a_time, unit=unit, setting="rollout_batch_size or eval_batch_size")
        if lora is None:
            MasterRMSNorm.install(model)
        else:
            adapters.add_adapter(model, adapters.POLICY, lora, self.lora_targets)
        for parameter in self.policy_parameters():
            parameter.requires_grad_(True)
        if model.is_gradient_checkpointing:
            # By its owner, with diffusers' function, which no graph can hold.
            self.enable_gradient_checkpointing()

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def prompt_encoder(self) -> PromptEncoder:
        return self.prompts.encoder

    def conditioning(self, embeddings: Embeddings) -> Conditioning:
        """The model's arguments (B, ...) for prompts' embeddings, on the device of those."""
        return Conditioning({name: embeddings[name] for name in self.prompt_arguments})

    @abstractmethod
    def predict_with(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Output (B, ...) of `model`, this family's class."""

    @abstractmethod
    def shared_trunk(self, fractions: tuple[float, ...] | None = None) -> SharedTrunk:
        """Taps on the actor at fractions of its depth. None: the family's own depths."""

    @abstractmethod
    def branch_trunk(self, num_blocks: int) -> Trunk:
        """Own copies of the last `num_blocks` blocks on the actor's lower features."""

    def schedule_arguments(self, num_steps: int) -> dict[str, Any]:
        """What the family's pipeline gives its scheduler besides the number of steps."""
        return {}

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        switch: AbstractContextManager[None] = nullcontext()
        if self._adapter != adapters.POLICY:
            switch = adapters.activated(self.model, self._adapter)
        with switch, self._running_dtype(sample):
            output = self.predict_with(self.model, sample.to(self.dtype), timestep, conditioning)
        # The update guides in float32 too: the first ratio is then exactly 1.
        return output.to(arithmetic_dtype(sample))

    def forward_signature(self) -> Hashable:
        return (
            self.dtype,
            self._adapter,
            self.model.training,
            attention_signature(self.model),
            adapters.signature(self.model),
            self._compilation,
            self._precision,
        )

    def build_trunk(self, config: CriticConfig) -> Trunk:
        trunk = self._trunk(config)
        if config.text_conditioning != "none":
            trunk = PromptTap(trunk, config.text_conditioning, self.any_prompt())
        trunk.compute_dtype = self.dtype
        return trunk

    def _trunk(self, config: CriticConfig) -> Trunk:
        if config.trunk in TAPPED_TRUNKS:
            return self._tapped_trunk(config, self.shared_trunk(config.taps))
        if config.trunk == "branch":
            return self.branch_trunk(config.num_blocks)
        if config.trunk == "clean_net":
            estimate = CleanEstimate(self.scheduler, self.prediction)
            return CleanNetTrunk(estimate, self.latent_maps, self.latent_shape)
        return registered_trunk(self, config)

    def _tapped_trunk(self, config: CriticConfig, shared: SharedTrunk) -> Trunk:
        if config.trunk in WEIGHTLESS_TRUNKS:
            return shared
        if config.trunk == "copy":
            return CopyTrunk(self.model, shared, self.predict_with)
        own = LoRAConfig(
            rank=config.lora_rank, target_modules=None if self.lora is None else self.lora.target_modules
        )
        return LoRATrunk(self.model, own, self.lora_targets, shared, self.predict_with)

    def any_prompt(self) -> Conditioning:
        """Conditioning (1, ...), for its widths."""
        if self.device.type != "meta":
            return self.encode_unconditional(1)
        # The cache wants numbers.
        return self.conditioning(self._on_device(self.prompt_encoder.encode_unconditional()))

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (B, ...); every distinct prompt is encoded once."""
        return self.conditioning(self._on_device(self.prompts.fetch(prompts)))

    def encode_unconditional(self, count: int) -> Conditioning:
        """Conditioning (B, ...) without a prompt, or with the negative one; copied once for all B."""
        embeddings = self._on_device(self.prompts.fetch_unconditional())
        return self.conditioning(
            {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in embeddings.items()}
        )

    def _on_device(self, embeddings: Embeddings) -> Embeddings:
        return {
            name: to_device(tensor, self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in embeddings.items()
        }

    def free_text_encoders(self) -> None:
        """Take the text encoders off the device, to the CPU.

        Embeddings are kept in files that all runs share, and a bounded part of them in memory. For prompts
        that have no file the encoders come back, and encode a block of those that are expected.
        """
        self.prompts.set_aside()
        self.expect_prompts([])

    def expect_prompts(self, draws: Iterable[Sequence[str]]) -> None:
        """Say which prompts are sampled next, draw by draw, in place of what was said before.

        It changes when files are read and prompts encoded, and no result. Before `free_text_encoders` it
        changes nothing.
        """
        self.prompts.expect(draws)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self._decoding.joined(lambda rows: self.codec.decode(latents[rows]), len(latents))

    def transition_table(self, config: SamplerConfig) -> TransitionTable:
        window = None if config.kind == "ode" else config.stochastic_window
        if config.shift != 1.0 and not is_flow(self.scheduler):
            raise ValueError(
                f"shift={config.shift} would be ignored: {type(self.scheduler).__name__} has the levels of "
                "its training, and only a flow's can be shifted; leave shift out"
            )
        if self.scheduler is not None and config.shift == 1.0:
            return from_scheduler(
                self.scheduler,
                config.num_steps,
                config.kind,
                config.noise_level,
                window=window,
                **self.schedule_arguments(config.num_steps),
            )
        sigmas = schedule.uniform_sigmas(config.num_steps, shift=config.shift)
        return schedule.flow_table(config.kind, sigmas, config.noise_level, window=window)

    def policy_parameters(self) -> list[nn.Parameter]:
        """The LoRA's weights, or all but the critic's LoRA."""
        trained = None if self.lora is None else adapters.POLICY
        return [each for name, each in self.model.named_parameters() if adapters.adapter_of(name) == trained]

    def policy_state(self) -> dict[str, Tensor]:
        if self.lora is not None:
            return adapters.adapter_state(self.model, adapters.POLICY)
        return adapters.plain_state(self.model)

    def load_policy(self, state: Mapping[str, Tensor], what: str) -> None:
        """Take over weights that were trained before, named as in `policy_state`; `what` is for messages."""
        load_in_place(self.policy_state(), state, what)
        self.continues_lora = self.lora is not None

    def frozen_anchor(self, which: str = "start") -> LatentBackbone:
        """A frozen policy: with LoRA on the policy's own weights, else a copy of them.

        Args:
            which: see KLPenalty.anchor.

        Raises:
            ValueError: for the base of a model of which all weights are trained.
        """
        anchor = copy.copy(self)
        anchor.critic = None
        if self.lora is None and which == "base":
            raise ValueError(
                "anchor='base' is the model without its LoRA, and here all weights are trained; use "
                "anchor='start', or train a LoRA"
            )
        if self.lora is None:
            anchor.model = copy.deepcopy(self.model).requires_grad_(False)
            return anchor
        # A new LoRA is no change at all.
        anchor._adapter = None
        if which == "start" and self.continues_lora:
            anchor._adapter = adapters.frozen_copy(self.model, anchor, self.lora, self.lora_targets)
        return anchor

    def shard(self, sharding: Divider) -> None:
        if is_quantized(self.model):
            raise ValueError(
                "base_precision='int8' is for a model that fits one GPU, and shard is for one that does "
                "not; use base_precision='model' or shard=1"
            )
        # An adapter is small, and cast as a whole where it is used.
        named = self.model.named_parameters()
        whole = frozenset(weight for name, weight in named if adapters.adapter_of(name))
        sharding.divide(Divisible(self.model, self.repeated_blocks, self.dtype, whole))
        trunk = None if self.critic is None else self.critic.trunk
        if trunk is not None and any(type(part).__name__ in self.repeated_blocks for part in trunk.modules()):
            sharding.divide(Divisible(trunk, self.repeated_blocks, self.dtype))

    def enable_gradient_checkpointing(self) -> None:
        checkpoint_blocks(self.model, self._running_dtype if self.lora is None else None)

    def _running_dtype(self, like: Tensor) -> AbstractContextManager[Any]:
        # A frozen base has the dtype itself.
        return running_in(self.dtype if self.lora is None else torch.float32, like)

    def compile_blocks(self, *, backend: str = "inductor", mode: str | None = None) -> None:
        """Compile the repeated blocks of the model and of its critic's trunk, for sampling and training.

        Args:
            backend: of torch.compile.
            mode: of torch.compile. None: "max-autotune-no-cudagraphs" on CUDA, else torch's default.
        """
        if mode is None and backend == "inductor" and self.device.type == "cuda":
            mode = "max-autotune-no-cudagraphs"
        roots = [self.model] if self.critic is None else [self.model, self.critic.trunk]
        compile_blocks(roots, self.repeated_blocks, backend=backend, mode=mode)
        self._compilation = (backend, mode)

    def quantized(self, precision: str) -> LatentBackbone:
        """This policy with quantised weights in the repeated blocks; see backbones.quantization.

        Args:
            precision: "fp8" or "fp8_weights".

        Raises:
            ValueError: where this machine or this model cannot.
        """
        if is_quantized(self.model):
            raise ValueError(
                f"rollout_precision={precision!r} quantises a base that base_precision='int8' quantised "
                "before; use rollout_precision='model', which samples with that base"
            )
        behaviour = copy.copy(self)
        behaviour.model, behaviour._quantized = quantized_copy(
            self.model, self.repeated_blocks, QUANTIZERS[precision](self.device), self.dtype
        )
        behaviour._precision = precision
        return behaviour

    def requantize(self) -> None:
        """Follow the policy that this is a quantised copy of; the base of a LoRA never moves."""
        if self._quantized is not None and self.lora is None:
            self._quantized.refresh()

    def saved_weights(self) -> dict[str, Tensor]:
        return self.storage.weights(self)

    def save_pretrained(self, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
        self.storage.write(self, directory, self.saved_weights() if weights is None else weights)

    def read_policy(self, directory: Path) -> dict[str, Tensor]:
        return self.storage.read(self, directory)
