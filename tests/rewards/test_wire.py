"""Requests hold the images and all that a server needs; answers are numbers or refused."""

from __future__ import annotations

import base64
import io
import json
import pickle
import pickletools

import numpy as np
import pytest
import torch
from PIL import Image

from lacfast.rewards.image_files import to_uint8
from lacfast.rewards.reward import BadAnswerError
from lacfast.rewards.wire import FlowGRPOFormat, JSONFormat, WireFormat

IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
METADATA = [{"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "two cups"}, {}]
PROMPTS = ["two cups", "a bench"]


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def test_json_request_holds_lossless_images_prompts_and_metadata() -> None:
    message = json.loads(JSONFormat().request(IMAGES, PROMPTS, METADATA))
    assert set(message) == {"images", "image_format", "prompts", "metadata"}
    assert (message["prompts"], message["metadata"], message["image_format"]) == (PROMPTS, METADATA, "png")
    pixels = [np.asarray(opened(base64.b64decode(text))) for text in message["images"]]
    assert np.array_equal(np.stack(pixels), to_uint8(IMAGES))


def test_json_request_may_hold_jpeg_files() -> None:
    message = json.loads(JSONFormat(image_format="jpeg").request(IMAGES, PROMPTS, METADATA))
    assert opened(base64.b64decode(message["images"][0])).format == "JPEG"
    with pytest.raises(ValueError, match="unknown image_format 'webp'"):
        JSONFormat(image_format="webp")
    with pytest.raises(ValueError, match="metadata cannot be written as JSON"):
        JSONFormat().request(IMAGES[:1], ["a"], [{"mask": IMAGES}])


def test_flow_grpo_request_is_what_its_servers_read() -> None:
    body = FlowGRPOFormat().request(IMAGES, PROMPTS, METADATA)
    message = pickle.loads(body)
    assert message["meta_datas"] == METADATA
    assert message["only_strict"] is True
    assert message["prompts"] == PROMPTS
    assert [opened(file).format for file in message["images"]] == ["JPEG", "JPEG"]
    assert opened(message["images"][0]).size == (24, 16)
    # Of plain types only: the server need not have this package, nor NumPy.
    names = [argument for opcode, argument, _ in pickletools.genops(body) if "GLOBAL" in opcode.name]
    assert names == []


@pytest.mark.parametrize("scores", [[0.5, 1.0], np.array([0.5, 1.0]), (np.float64(0.5), np.float32(1.0))])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_flow_grpo_answers_with_numpy_numbers_are_read(scores: object, protocol: int) -> None:
    answer = {"scores": scores, "group_rewards": {"counting": [-10.0]}}
    assert FlowGRPOFormat().scores(pickle.dumps(answer, protocol)) == [(0.5,), (1.0,)]


@pytest.mark.parametrize(
    ("wire", "body", "message"),
    [
        (JSONFormat(), b"<html>", "the answer is no JSON"),
        (JSONFormat(), b"\xff", "the answer is no JSON"),
        (JSONFormat(), b"[" * 100_000, "the answer is no JSON"),
        (JSONFormat(), b'{"scores": [' + b"9" * 5000 + b"]}", "the answer is no JSON"),
        (JSONFormat(), b'{"scores": [' + b"9" * 400 + b"]}", "a score is an integer beyond all floats"),
        (JSONFormat(), b"[1, 2]", "the answer has no 'scores'"),
        (JSONFormat(), b'{"scores": ["good"]}', "a score is a str"),
        (JSONFormat(), b'{"scores": [[1.0], [2.0]]}', "a score is a list"),
        (JSONFormat(), b'{"scores": 1.0}', "the scores are a float; a list"),
        (FlowGRPOFormat(), b"", "the answer is no plain pickle"),
        (FlowGRPOFormat(), pickle.dumps([1.0])[:-3], "the answer is no plain pickle"),
        (FlowGRPOFormat(), pickle.dumps({"scores": [1 << 2000]}), "a score is an integer beyond all floats"),
        (FlowGRPOFormat(), pickle.dumps([1.0]), "the answer has no 'scores' but list"),
        (FlowGRPOFormat(), pickle.dumps({"outputs": [1.0]}), r"the answer has no 'scores' but \['outputs'\]"),
    ],
)
def test_other_answers_are_refused(wire: WireFormat, body: bytes, message: str) -> None:
    with pytest.raises(BadAnswerError, match=message):
        wire.scores(body)


def test_json_of_several_heads_is_an_object_of_lists() -> None:
    wire = JSONFormat(heads=("style", "content"))
    body = b'{"scores": {"content": [1, 2], "style": [3, 4.5]}}'
    assert wire.scores(body) == [(3.0, 1.0), (4.5, 2.0)]
    for wrong, message in (
        (b'{"scores": [1, 2]}', r"'scores' are no object of \['style', 'content'\]"),
        (b'{"scores": {"content": [1, 2]}}', "'scores' are no object of"),
        (b'{"scores": {"content": [1, 2], "style": [3]}}', r"the answer has \[1, 2\] scores of"),
        (b'{"scores": {"content": [1], "style": ["3"]}}', "a score is a str"),
    ):
        with pytest.raises(BadAnswerError, match=message):
            wire.scores(wrong)
