"""Videos reach rewards whole where they declare it, else as chosen frames whose scores are averaged."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import Refusal
from reward_server import Server
from tiny_backbones import brightness, tiny_backbone, tiny_config
from torch import Tensor

from lacfast import SteeringConfig, steer
from lacfast.rewards.frames import JUDGED_FRAMES, judged_frames, judged_places
from lacfast.rewards.image_files import to_uint8
from lacfast.rewards.registry import RewardSet
from lacfast.rewards.remote import RemoteReward
from lacfast.rewards.reward import RewardError, declares
from lacfast.rewards.wire import JSONFormat
from lacfast.trainer import LatentActorCriticTrainer

VIDEOS = torch.rand(2, 5, 3, 8, 12, generator=torch.Generator().manual_seed(0))
PROMPTS, METADATA = ["1.0", "2.0"], [{"tag": "a"}, {"tag": "b"}]


@declares(video=True)
def motion(videos: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Mean change from frame to frame."""
    return videos.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("total", "count", "places"),
    [
        (5, 3, [0, 2, 4]),
        (5, 1, [2]),
        (1, 1, [0]),
        (2, 3, [0, 1]),
        (33, 9, [*range(0, 33, 4)]),
        (81, 2, [0, 80]),
    ],
)
def test_frames_are_evenly_spaced_from_the_first_to_the_last(
    total: int, count: int, places: list[int]
) -> None:
    assert judged_places(total, count) == places
    assert torch.equal(judged_frames(VIDEOS, 2), VIDEOS[:, [0, 4]])
    images = VIDEOS[:, 0]
    assert judged_frames(images, 2) is images


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_reward_of_images_judges_frames_with_their_own_prompt_and_its_score_is_their_mean(
    count: int,
) -> None:
    asked: list[Any] = []

    @declares(heads=("light", "wanted"), reference="")
    def both(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> dict[str, Any]:
        asked.append((images, prompts, metadata))
        return {"light": images.mean(dim=(1, 2, 3)), "wanted": [float(prompt) for prompt in prompts]}

    scores = RewardSet.create(both).judging(count).score(VIDEOS, PROMPTS, METADATA)
    ((images, prompts, metadata),) = asked
    assert torch.equal(images, VIDEOS[:, judged_places(5, count)].flatten(0, 1))
    assert prompts == [prompt for prompt in PROMPTS for _ in range(count)]
    assert metadata == [each for each in METADATA for _ in range(count)]
    expected = VIDEOS[:, judged_places(5, count)].mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(scores["light"], expected)
    assert scores["wanted"].tolist() == [1.0, 2.0]


def test_a_reward_of_videos_gets_all_frames_as_a_copy_of_its_own() -> None:
    kept = VIDEOS.clone()

    @declares(video=True)
    def vandal(videos: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        assert videos.shape == VIDEOS.shape
        return videos.zero_().sum(dim=(1, 2, 3, 4))

    scores = RewardSet.create([vandal, motion]).judging(1).score(VIDEOS, PROMPTS, METADATA)
    assert torch.equal(VIDEOS, kept)
    torch.testing.assert_close(scores["motion"], motion(VIDEOS, PROMPTS, METADATA))


def test_videos_may_be_lists_of_pictures() -> None:
    @declares(video=True, images="pil")
    def red(videos: list[list[Image.Image]], prompts: list[str], metadata: list[Any]) -> list[float]:
        assert [len(video) for video in videos] == [5, 5]
        return [float(np.mean([np.asarray(frame)[..., 0] for frame in video])) for video in videos]

    scores = RewardSet.create(red).judging(3).score(VIDEOS, PROMPTS, METADATA)["red"]
    torch.testing.assert_close(scores, 255 * VIDEOS[:, :, 0].mean(dim=(1, 2, 3)), rtol=0, atol=0.5)


def test_a_reward_of_videos_is_refused_where_images_are_made() -> None:
    backbone = tiny_backbone("dit")
    refusal = Refusal(
        "reward 'motion' judges videos and the model makes images",
        cause="A reward that declares `video=True` for a model of images.",
        remedy="leave it out, or train a model of videos",
    )
    with refusal.raised():
        LatentActorCriticTrainer(backbone, motion, ["one red circle"], tiny_config())
    with refusal.raised():
        steer(backbone, ["one red circle"], SteeringConfig(selection="reward"), rewards=motion)
    with pytest.raises(RewardError, match=r"'motion' judges videos, and images of shape \(2, 3, 8, 12\)"):
        RewardSet.create(motion).score(VIDEOS[:, 0], PROMPTS, METADATA)


def test_a_union_judges_as_many_frames_as_its_first_set() -> None:
    sets = [RewardSet.create(each).judging(1) for each in (brightness, motion)]
    assert RewardSet.union(sets).judged == 1
    assert RewardSet.create(brightness).judging(0).judged == JUDGED_FRAMES


def test_a_server_that_judges_videos_is_sent_all_frames_of_each() -> None:
    server = Server()
    try:
        reward = RemoteReward(urls=[server.url], wire=JSONFormat(video=True), batch_size=1)
        scores = RewardSet.create(reward).judging(1).score(VIDEOS, PROMPTS, METADATA)
        assert scores["remote"].tolist() == [1.0, 2.0]
        assert {len(request["videos"]) for request in server.requests} == {1}
    finally:
        server.close()
    message = json.loads(JSONFormat(video=True).request(VIDEOS, PROMPTS, METADATA))
    assert set(message) == {"videos", "image_format", "prompts", "metadata"}
    for files, video in zip(message["videos"], VIDEOS, strict=True):
        frames = [np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))) for file in files]
        assert np.array_equal(np.stack(frames), to_uint8(video))
