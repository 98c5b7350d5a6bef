"""One call of a reward: what it is given, what it may return, and a check before anything learns from it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lacfast.rewards.frames import JUDGED_FRAMES, is_video, judged_frames, repeated
from lacfast.rewards.image_files import pictures
from lacfast.rewards.reward import TIME_LIMIT_S, Declaration, NotFiniteError, Reward, RewardError
from lacfast.rewards.workers import Caller, TooLongError

_REMEDY = "fix the reward, or set on_reward_error='skip' to drop such rollouts"


def time_limit(function: Reward) -> float:
    """Seconds that one call of a reward may take."""
    limit_s: float = getattr(function, "time_limit_s", TIME_LIMIT_S)
    return limit_s


def scored(
    name: str,
    function: Reward,
    images: Tensor,
    prompts: list[str],
    metadata: list[dict[str, Any]],
    caller: Caller,
    *,
    judged: int = JUDGED_FRAMES,
) -> dict[str, Tensor]:
    """Head -> (B,) float32 on the CPU: the reward's own name, or the heads that it declares.

    Args:
        name: of the reward.
        function: the reward.
        images: (B, 3, H, W) or videos (B, F, 3, H, W); the reward gets a copy.
        prompts: B of them.
        metadata: B of them; the reward gets copies of their containers and arrays.
        caller: makes the call.
        judged: frames of a video that a reward of images is given.

    Raises:
        RewardError: when the reward raises, takes too long, or returns what is not scores of its heads; it
            names the reward, the prompts and what came back.
    """
    declaration, limit_s = Declaration.of(function), time_limit(function)
    if declaration.video and not is_video(images):
        raise RewardError(
            f"reward {name!r} judges videos, and images of shape {tuple(images.shape)} were made; {_REMEDY}"
        )
    if is_video(images) and not declaration.video:
        frames = judged_frames(images, judged)
        count = frames.shape[1]
        told = (repeated(prompts, count), repeated(metadata, count))
        by_frame = scored(name, function, frames.flatten(0, 1), *told, caller)
        return {head: scores.view(-1, count).mean(dim=1) for head, scores in by_frame.items()}

    def call() -> Any:
        # What a reward changes in place is its own: the others and later iterations see what was made.
        own = _copied(metadata)
        given = images.clone() if declaration.images == "tensor" else _pictures(images)
        if not (key := declaration.reference):
            return function(given, list(prompts), own)
        references: list[Any] = [
            reference(prompt, about, key=key) for prompt, about in zip(prompts, own, strict=True)
        ]
        if declaration.images == "tensor":
            references = [_pixels(each, images) for each in references]
        return function(given, list(prompts), own, references=references)

    try:
        returned = caller(call, limit_s, images)
    except TooLongError as error:
        raise RewardError(
            f"reward {name!r} has not returned for {limit_s:g} s for prompts {_some(prompts)} and is left "
            f"behind; {_REMEDY}; one that needs longer says so by an attribute time_limit_s, in seconds"
        ) from error
    except Exception as error:
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error} for prompts {_some(prompts)}; {_REMEDY}"
        ) from error
    by_head = _by_head(name, declaration.heads, _without_notes(returned), prompts)
    return {head: _checked(name, head, raw, prompts) for head, raw in by_head.items()}


def _without_notes(returned: Any) -> Any:
    """The scores of a pair of scores and a dict of notes, as flow_grpo's rewards return it."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        return returned[0]
    return returned


def _by_head(name: str, heads: tuple[str, ...], returned: Any, prompts: list[str]) -> dict[str, Any]:
    """What was returned for each head.

    Raises:
        RewardError: for other names than the declared ones.
    """
    if not isinstance(returned, Mapping):
        if heads:
            raise RewardError(
                f"reward {name!r} declares the scores {list(heads)} and returned {_short(returned)} for "
                f"prompts {_some(prompts)}; return a dict of them"
            )
        return {name: returned}
    if set(returned) != set(heads):
        declared = f"declares the scores {list(heads)}" if heads else "declares no scores by name"
        raise RewardError(
            f"reward {name!r} {declared} and returned {list(returned)} for prompts {_some(prompts)}; the "
            "heads of the critic are made before the first call, so set the reward's attribute "
            f"declaration = Declaration(heads={tuple(map(str, returned))})"
        )
    return {head: returned[head] for head in heads}


def _checked(name: str, head: str, raw: Any, prompts: list[str]) -> Tensor:
    """The scores of one head as (B,) float32 on the CPU.

    Raises:
        RewardError: when they are none.
    """
    told = f"reward {name!r}" + (f" for its score {head!r}" if head != name else "")
    try:
        scores = torch.as_tensor(raw).detach()
        # Half of a complex number would be dropped.
        if scores.is_complex():
            raise TypeError(scores.dtype)
        scores = scores.to("cpu", torch.float32)
    except Exception as error:
        raise RewardError(
            f"{told} returned a {type(raw).__name__} that is no tensor of numbers, {_short(raw)}, for "
            f"prompts {_some(prompts)}; return one number per image, as a tensor, an array or a list"
        ) from error
    if scores.shape != (len(prompts),):
        raise RewardError(
            f"{told} returned shape {tuple(scores.shape)} for {len(prompts)} images, {_short(raw)}, of "
            f"prompts {_some(prompts)}; return one number per image"
        )
    finite = scores.isfinite()
    if not bool(finite.all()):
        culprits = [prompt for prompt, good in zip(prompts, finite.tolist(), strict=True) if not good]
        raise RewardError(
            f"{told} returned {scores[~finite][0].item()} for prompts {_some(culprits)}; {_REMEDY}"
        )
    return scores


def require_finite(images: Tensor, prompts: list[str], origin: Callable[[], str] | None = None) -> None:
    """A check of images (B, ...) before anybody looks at them.

    Args:
        images: of `prompts`.
        prompts: B of them.
        origin: says where a NaN came from, once there is one. None: nobody knows.

    Raises:
        NotFiniteError: naming the prompts and the origin.
    """
    # As a JPEG file a picture of NaN is black, and nearly the best there is.
    finite = images.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        culprits = [prompt for prompt, good in zip(prompts, finite.tolist(), strict=True) if not good]
        raise NotFiniteError(
            f"{origin() if origin else 'sampling or decoding'} made NaN or infinity in the images of prompts "
            f"{_some(culprits)}, so that no reward was asked; lower the learning rate or the guidance scale, "
            "or use float32 or bfloat16"
        )


def require_reference(prompt: str, metadata: dict[str, Any], *, key: str) -> None:
    """
    Raises:
        ValueError: for a prompt without a picture to compare with, or with the path of none.
    """
    found = metadata.get(key)
    if found is None:
        raise ValueError(
            f"the metadata of prompt {prompt!r} lack {key!r}, the picture to compare with; "
            "give each prompt its path there"
        )
    if isinstance(found, str | Path) and not Path(found).is_file():
        raise ValueError(
            f"there is no file {str(found)!r}, the {key!r} of prompt {prompt!r}; "
            f"write paths as seen from {str(Path.cwd())!r}"
        )


def reference(prompt: str, metadata: dict[str, Any], *, key: str) -> Image.Image:
    """The picture under `key` as an RGB image.

    Raises:
        ValueError: see require_reference; or for what is no picture.
    """
    require_reference(prompt, metadata, key=key)
    found = metadata[key]
    if isinstance(found, str | Path):
        with Image.open(found) as file:
            return file.convert("RGB")
    if isinstance(found, Image.Image):
        return found.convert("RGB")
    pixels = torch.as_tensor(found)
    if pixels.ndim != 3 or len(pixels) != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"the reference {key!r} is {pixels.dtype} of shape {tuple(pixels.shape)}; "
            "give (3, H, W) in [0, 1], an image of Pillow or a path"
        )
    return pictures(pixels[None])[0]


def _pictures(images: Tensor) -> list[Any]:
    """Images of Pillow, or a list of them for each video."""
    return [pictures(video) for video in images] if is_video(images) else pictures(images)


def _pixels(picture: Image.Image, like: Tensor) -> Tensor:
    """(3, H, W) in [0, 1], of dtype and device of `like`."""
    levels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    return levels.to(like.device).to(like.dtype) / 255


def _copied(value: Any) -> Any:
    """Containers, arrays and tensors anew; objects of other classes are the same."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copied(each) for each in value]
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if isinstance(value, np.ndarray | set) else value


def _short(value: Any) -> str:
    """What came back, as far as a line holds it."""
    return reprlib.repr(value)


def _some(prompts: list[str]) -> str:
    return f"{prompts[:3]}" + (f" and {len(prompts) - 3} more" if len(prompts) > 3 else "")
