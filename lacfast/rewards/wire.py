"""What travels between a remote reward and its server: our JSON, and the pickles of flow_grpo's servers."""

from __future__ import annotations

import base64
import json
import pickle
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lacfast.rewards.image_files import encode_images
from lacfast.rewards.plain_pickle import read_plain_pickle
from lacfast.rewards.reward import BadAnswerError


class WireFormat(Protocol):
    """How a batch is written into a request, and scores are read from the answer."""

    @property
    def content_type(self) -> str:
        """Content type of the request."""

    def request(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> bytes:
        """The body of the POST request."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the scores of one image; empty where there is one without a name of its own."""

    @property
    def video(self) -> bool:
        """Whether requests are of videos."""

    def scores(self, body: bytes) -> list[tuple[float, ...]]:
        """The scores of an answer's body: a row per image, in it one of each head.

        Raises:
            BadAnswerError: when it holds none.
        """


@dataclass(frozen=True, kw_only=True)
class JSONFormat:
    """Our own format.

    Request: {"images": [base64 of a file, ...], "image_format": "png" or "jpeg", "prompts": [str, ...],
    "metadata": [object, ...]}; with `video` "videos" in place of "images", a list of files for each. Answer:
    {"scores": [number, ...]}, one per image, in order; with `heads` {"scores": {head: [number, ...], ...}}.
    """

    image_format: str = "png"
    """"png" keeps every bit; "jpeg" (quality 95) is about five times smaller."""
    heads: tuple[str, ...] = ()
    """Names of the scores that the server gives each image. Empty: one score, which has no name."""
    video: bool = False
    """The server judges whole videos and is sent all frames of each."""

    def __post_init__(self) -> None:
        if self.image_format not in ("png", "jpeg"):
            raise ValueError(f"unknown image_format {self.image_format!r}; known: 'png', 'jpeg'")

    @property
    def content_type(self) -> str:
        return "application/json"

    def request(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> bytes:
        # zlib's fastest level: a local network is faster than its better ones.
        settings = {"compress_level": 1} if self.image_format == "png" else {"quality": 95}
        frames = images.flatten(0, 1) if self.video else images
        files = encode_images(frames, image_format=self.image_format.upper(), **settings)
        texts = [base64.b64encode(file).decode("ascii") for file in files]
        shown: dict[str, Any] = {"images": texts}
        if self.video:
            count = images.shape[1]
            shown = {"videos": [texts[first : first + count] for first in range(0, len(texts), count)]}
        message = shown | {
            "image_format": self.image_format,
            "prompts": prompts,
            "metadata": metadata,
        }
        try:
            return json.dumps(message).encode()
        except TypeError as error:
            raise ValueError(f"the prompts' metadata cannot be written as JSON: {error}") from error

    def scores(self, body: bytes) -> list[tuple[float, ...]]:
        answer = read_json(body)
        if not isinstance(answer, dict) or "scores" not in answer:
            raise BadAnswerError(f"the answer has no 'scores': {body[:80]!r}")
        found = answer["scores"]
        if not self.heads:
            return [(score,) for score in _numbers(found)]
        if not isinstance(found, dict) or set(found) != set(self.heads):
            raise BadAnswerError(f"the answer's 'scores' are no object of {list(self.heads)}: {body[:80]!r}")
        columns = [_numbers(found[head]) for head in self.heads]
        if len(set(map(len, columns))) > 1:
            raise BadAnswerError(f"the answer has {list(map(len, columns))} scores of {list(self.heads)}")
        return list(zip(*columns, strict=True))


@dataclass(frozen=True, kw_only=True)
class FlowGRPOFormat:
    """The format of flow_grpo's reward-server (GenEval, DeQA) and of the UnifiedReward server it calls.

    Request: a pickled dict with `images` (JPEG files as bytes), `prompts`, `meta_datas` and `only_strict`;
    each of the servers reads the keys it knows. Answer: a pickled dict of lists.

    A pickle can run any code when it is unpickled, so answers are not: `read_plain_pickle` reads numbers,
    text, lists, dicts and NumPy arrays and refuses everything else. The requests are pickles too: such a
    server must trust whoever can reach it.
    """

    answer: str = "scores"
    """Key of the scores: GenEval's server has "scores" (partial credit; what flow_grpo trains on),
    "strict_rewards" (0 or 1) and "rewards" (its looser count; needs only_strict=False); DeQA and
    UnifiedReward have "outputs"."""
    only_strict: bool = True
    """GenEval only: leave the looser count out, which saves the server time."""
    quality: int = 75
    """Quality of the JPEG files, 1 to 95; flow_grpo sends 75."""

    @property
    def content_type(self) -> str:
        return "application/octet-stream"

    def request(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> bytes:
        message = {
            "images": encode_images(images, image_format="JPEG", quality=self.quality),
            "prompts": list(prompts),
            "meta_datas": list(metadata),
            "only_strict": self.only_strict,
        }
        # Servers may run an older Python.
        return pickle.dumps(message, protocol=4)

    @property
    def heads(self) -> tuple[str, ...]:
        return ()

    @property
    def video(self) -> bool:
        return False

    def scores(self, body: bytes) -> list[tuple[float, ...]]:
        answer = read_plain_pickle(body)
        if not isinstance(answer, dict) or self.answer not in answer:
            keys = sorted(answer)[:9] if isinstance(answer, dict) else type(answer).__name__
            raise BadAnswerError(f"the answer has no {self.answer!r} but {keys}")
        return [(score,) for score in _numbers(answer[self.answer])]


def read_json(text: bytes | str) -> Any:
    """What a server's JSON says.

    Raises:
        BadAnswerError: when it is none.
    """
    try:
        return json.loads(text)
    # Of integers of thousands of digits, and of lists nested in thousands.
    except (ValueError, RecursionError) as error:
        raise BadAnswerError(f"the answer is no JSON that can be read: {text[:80]!r}") from error


def _numbers(values: Any) -> list[float]:
    """The scores as floats; values are the server's, so that messages say their types only."""
    if not isinstance(values, list | tuple):
        raise BadAnswerError(f"the scores are a {type(values).__name__}; a list of numbers was expected")
    for score in values:
        if type(score) not in (int, float, bool):
            raise BadAnswerError(f"a score is a {type(score).__name__}; one number per image was expected")
    try:
        return [float(score) for score in values]
    except OverflowError as error:
        raise BadAnswerError("a score is an integer beyond all floats") from error
