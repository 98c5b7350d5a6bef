"""Requests hold the images and all that a server needs; answers are numbers or refused."""

from __future__ import annotations

import base64
import io
import json
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lacfast.rewards.image_files import to_uint8
from lacfast.rewards.wire import BadAnswerError, FlowGRPOFormat, JSONFormat, WireFormat, read_plain_pickle

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
    assert FlowGRPOFormat().scores(pickle.dumps(answer, protocol)) == [0.5, 1.0]


def test_pickles_of_older_numpy_are_read() -> None:
    # Protocol 0 is text, so that a name in it can be exchanged.
    body = pickle.dumps({"outputs": [np.float64(0.25)]}, 0).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core" in body
    assert FlowGRPOFormat(answer="outputs").scores(body) == [0.25]


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "touched",)  # type: ignore[return-value]

    body = pickle.dumps({"scores": Harmful()})
    with pytest.raises(BadAnswerError, match="is not plain data; pickles may run code, so it is refused"):
        read_plain_pickle(body)
    assert not (tmp_path / "touched").exists()
    for name in ("eval", "getattr"):
        with pytest.raises(BadAnswerError, match=f"builtins.{name} is not plain data"):
            read_plain_pickle(f"cbuiltins\n{name}\n.".encode())


@pytest.mark.parametrize(
    ("wire", "body", "message"),
    [
        (JSONFormat(), b"<html>", "the answer is no JSON"),
        (JSONFormat(), b"\xff", "the answer is no JSON"),
        (JSONFormat(), b"[1, 2]", "the answer has no 'scores'"),
        (JSONFormat(), b'{"scores": ["good"]}', "the scores are no numbers"),
        (JSONFormat(), b'{"scores": [[1.0], [2.0]]}', r"the scores have shape \(2, 1\)"),
        (JSONFormat(), b'{"scores": 1.0}', r"the scores have shape \(\)"),
        (FlowGRPOFormat(), b"", "the answer is no plain pickle"),
        (FlowGRPOFormat(), pickle.dumps([1.0])[:-3], "the answer is no plain pickle"),
        (FlowGRPOFormat(), pickle.dumps([1.0]), "the answer has no 'scores' but list"),
        (FlowGRPOFormat(), pickle.dumps({"outputs": [1.0]}), r"the answer has no 'scores' but \['outputs'\]"),
    ],
)
def test_other_answers_are_refused(wire: WireFormat, body: bytes, message: str) -> None:
    with pytest.raises(BadAnswerError, match=message):
        wire.scores(body)
