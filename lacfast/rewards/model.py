"""What rewards with a network share: loading at first use, batches, number format, their own CUDA stream."""

from __future__ import annotations

import gc
import re
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.request import getproxies

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from torch import Tensor, nn

from lacfast.rewards.exchange import UnavailableError, reach
from lacfast.rewards.reward import BadAnswerError, RewardError
from lacfast.runtime.memory import BatchSize

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_REACH_S = 10.0
"""Seconds in which the hub must let a run in that begins."""


@dataclass(kw_only=True, eq=False)
class ModelReward(ABC):
    """A reward whose network is loaded at the first call and then stays."""

    name: str = "model"
    """Name under which the scores are reported."""
    device: str = "auto"
    """"auto": the device of the images; otherwise a torch device such as "cuda:1" or "cpu"."""
    dtype: torch.dtype | str = "auto"
    """Dtype of the network: "auto" is bfloat16 on CUDA and float32 elsewhere. Scores are computed in
    float32 from its embeddings."""
    batch_size: int = 32
    """Images per forward of the network, >= 1; halved when memory runs out."""
    offload: bool = False
    """Move the network to the CPU after every call: frees the device for training, costs a copy per call."""
    _network: nn.Module | None = field(default=None, init=False, repr=False)
    _stream: torch.cuda.Stream | None = field(default=None, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} scores nothing; use 1 or more")
        if self.dtype != "auto" and not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"dtype={self.dtype!r} is unknown; use 'auto' or a torch.dtype")

    @abstractmethod
    def load(self) -> nn.Module:
        """The network on the CPU in float32."""

    @abstractmethod
    def score(
        self, network: nn.Module, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor:
        """(B,) scores of images (B, 3, H, W) float32 in [0, 1] on the network's device."""

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """(B,) float32 scores on the CPU; no gradient.

        On CUDA the work runs on a stream of this reward: it starts when the caller's stream has made the
        images, and the caller's stream does not wait for it. The host waits for the scores.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(
                f"reward {self.name!r} got images of shape {tuple(images.shape)} for {len(prompts)} prompts; "
                "give one (3, H, W) image in [0, 1] per prompt"
            )
        device = images.device if self.device == "auto" else torch.device(self.device)
        # The caller's autocast would change what the network computes.
        plain = torch.autocast(device.type, enabled=False)
        with self._lock, torch.no_grad(), plain, self._off_the_training_stream(images, device):
            network = self._network_on(device)
            size = BatchSize(self.batch_size, unit="image", setting=f"batch_size of reward {self.name!r}")
            parts = size.parts(
                lambda rows: self._scored(network, images[rows], prompts[rows], metadata[rows], device),
                len(prompts),
            )
            # The copy to the host waits for this stream alone.
            scores = torch.cat(list(parts)).cpu()
            self.batch_size = size.size
            if self.offload:
                network.to("cpu")
        return scores

    def check(self) -> None:
        """Ask for the files: a model that is not on this disk needs the hub.

        Raises:
            RewardError: when it cannot be asked.
        """
        missing = [source for source in self._hub_ids() if not _is_cached(source)]
        # A proxy would be asked in its place.
        if self._network is not None or not missing or getproxies():
            return None
        fault = "HF_HUB_OFFLINE is set"
        if not constants.HF_HUB_OFFLINE:
            try:
                return reach(constants.ENDPOINT, _REACH_S)
            except (UnavailableError, BadAnswerError) as error:
                fault = f"{constants.ENDPOINT}: {error}"
        raise RewardError(
            f"reward {self.name!r} needs {', '.join(missing)}, not on this disk, and the hub cannot be asked "
            f"({fault}); run `hf download {missing[0]}` where there is a network, or pass directories"
        )

    def prepare(self) -> None:
        """Load the network now, and not at the first call."""
        with self._lock:
            self._loaded()

    def _hub_ids(self) -> list[str]:
        """The settings that name a repository of the hub."""
        values = [str(getattr(self, each.name)) for each in fields(self) if not each.name.startswith("_")]
        return [value for value in values if _HUB_ID.fullmatch(value) and not Path(value).exists()]

    def unload(self) -> None:
        """Forget the network; the next call loads it again."""
        with self._lock:
            self._network = None
            gc.collect()

    def _scored(
        self,
        network: nn.Module,
        images: Tensor,
        prompts: list[str],
        metadata: list[dict[str, Any]],
        device: torch.device,
    ) -> Tensor:
        scores = self.score(network, images.to(device, torch.float32), prompts, metadata)
        return scores.float().reshape(-1)

    def _network_on(self, device: torch.device) -> nn.Module:
        network = self._loaded()
        automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = self.dtype if isinstance(self.dtype, torch.dtype) else automatic
        self.place(network, device, dtype)
        return network

    def _loaded(self) -> nn.Module:
        if self._network is None:
            self._network = self.load().requires_grad_(False).eval()
        return self._network

    def place(self, network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Move the network; overridden where a part of it must stay in float32."""
        network.to(device, dtype)

    def _off_the_training_stream(self, images: Tensor, device: torch.device) -> Any:
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if images.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(images.device))
            images.record_stream(self._stream)
        return torch.cuda.stream(self._stream)


def _is_cached(hub_id: str) -> bool:
    folder = repo_folder_name(repo_id=hub_id, repo_type="model")
    return (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir()


def checkpoint_file(source: str | Path, filename: str) -> Path:
    """A file of weights: `source` itself when it is one, else `filename` in that directory or hub id."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / filename).is_file():
            return path / filename
        raise ValueError(f"there is no {filename!r} in {str(source)!r}; pass the file itself")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(source), filename))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or a torch checkpoint; nothing else of the latter is executed or kept."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = weights.get("state_dict", weights)
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}


def load_exactly(network: nn.Module, weights: dict[str, Tensor], origin: str | Path) -> None:
    """Copy the weights in.

    Raises:
        ValueError: when a weight is missing, superfluous or of another shape.
    """
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{origin} does not fit {type(network).__name__}; pass the weights of that network: {error}"
        ) from error
