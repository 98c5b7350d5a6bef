"""A vision language model as judge, over the chat API that OpenAI defined and vLLM and SGLang serve.

One image a request, so that its score does not depend on its neighbours; several requests of a batch are in
flight at once. An answer that is not what was asked for is asked again, and is never a score.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from lacfast.config.checks import Config, Finite, require, unknown
from lacfast.rewards.credentials import api_key
from lacfast.rewards.image_files import encode_picture, pictures
from lacfast.rewards.remote import RemoteReward
from lacfast.rewards.reward import BadAnswerError, Declaration
from lacfast.rewards.scoring import reference, require_reference
from lacfast.rewards.wire import WireFormat, read_json

ENDPOINT = "/chat/completions"

TEMPLATE = """You judge a generated image against the prompt that asked for it.
Prompt: {prompt}
Rate how well the image shows everything that the prompt asks for: 0 is not at all, 10 is fully.
Answer with JSON alone: {"score": <number from 0 to 10>}"""


class Answer(Protocol):
    """What a judge must say, and how scores are read from it."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the scores, as in WireFormat."""

    @property
    def options(self) -> dict[str, Any]:
        """Fields of the request that make a server keep to it."""

    def scores(self, text: str) -> tuple[float, ...]:
        """One number for each head, or one.

        Raises:
            BadAnswerError: when the text is not what was asked for, or a score is out of its range.
        """


@dataclass(frozen=True, kw_only=True)
class JSONAnswer(Config):
    """A JSON object with one number for each criterion and nothing else; servers are told its schema."""

    criteria: tuple[str, ...] = ("score",)
    """The object's keys. Of several each is a score of its own; a single one has the reward's name."""
    low: Finite = 0.0
    """Smallest score that counts."""
    high: Finite = 10.0
    """Largest score that counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.criteria), "criteria=() asks for no score; name one or more")
        _require_range(self.low, self.high)

    @property
    def heads(self) -> tuple[str, ...]:
        return self.criteria if len(self.criteria) > 1 else ()

    @property
    def options(self) -> dict[str, Any]:
        number = {"type": "number", "minimum": self.low, "maximum": self.high}
        schema = {
            "type": "object",
            "properties": dict.fromkeys(self.criteria, number),
            "required": list(self.criteria),
            "additionalProperties": False,
        }
        named = {"name": "verdict", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": named}}

    def scores(self, text: str) -> tuple[float, ...]:
        found = read_json(text)
        if not isinstance(found, dict) or set(found) != set(self.criteria):
            raise BadAnswerError(f"the judge's answer is no object of {list(self.criteria)}: {text[:200]!r}")
        return tuple(_in_range(found[name], self.low, self.high, text) for name in self.criteria)


@dataclass(frozen=True, kw_only=True)
class LabelledAnswer(Config):
    """A text in which each score stands behind a label, once."""

    labels: tuple[tuple[str, str], ...]
    """(head, label) of each score; a single one has the reward's name."""
    low: Finite
    """Smallest score that counts."""
    high: Finite
    """Largest score that counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.labels), "labels=() finds no score; name one or more")
        _require_range(self.low, self.high)

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(head for head, _ in self.labels) if len(self.labels) > 1 else ()

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def scores(self, text: str) -> tuple[float, ...]:
        return tuple(self._score(label, text) for _, label in self.labels)

    def _score(self, label: str, text: str) -> float:
        found = re.findall(re.escape(label) + r"\s*(-?\d+(?:\.\d+)?)", text)
        if len(found) != 1:
            raise BadAnswerError(
                f"the judge's answer has {len(found)} numbers behind {label!r}, not one: {text[-200:]!r}"
            )
        return _in_range(float(found[0]), self.low, self.high, text)


def _require_range(low: float, high: float) -> None:
    require(low < high, f"low={low:g} and high={high:g} leave no score; give low below high")


def _in_range(score: Any, low: float, high: float, text: str) -> float:
    # bool is an int.
    if type(score) not in (int, float) or not low <= score <= high:
        raise BadAnswerError(
            f"the judge's score {score!r} is no number from {low:g} to {high:g}: {text[:200]!r}"
        )
    return float(score)


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A request of the chat API about one image, and the scores in the answer's first choice.

    The temperature is 0, so that a server which decodes deterministically judges an image the same way twice.
    """

    model: str
    """The model's name, as the server knows it."""
    template: str
    """The question. "{prompt}" stands for the prompt."""
    answer: Answer
    max_tokens: int
    """Most tokens of an answer; one that is cut off is no answer."""
    reference: str = ""
    """Key of the metadata with a picture to compare with, which is shown first. Empty: none."""

    @property
    def content_type(self) -> str:
        return "application/json"

    @property
    def heads(self) -> tuple[str, ...]:
        return self.answer.heads

    @property
    def video(self) -> bool:
        return False

    def request(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> bytes:
        (prompt,), (about,) = prompts, metadata
        shown = [reference(prompt, about, key=self.reference)] if self.reference else []
        shown += pictures(images)
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in shown
        ]
        content.append({"type": "text", "text": self.template.replace("{prompt}", prompt)})
        message = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            **self.answer.options,
        }
        return json.dumps(message).encode()

    def scores(self, body: bytes) -> list[tuple[float, ...]]:
        answer = read_json(body)
        try:
            choice = answer["choices"][0]
            text, end = choice["message"]["content"], choice.get("finish_reason")
        except (TypeError, KeyError, IndexError, AttributeError):
            raise BadAnswerError(f"the answer is no chat completion: {body[:200]!r}") from None
        if end == "length":
            raise BadAnswerError(f"the judge's answer was cut off; raise max_tokens={self.max_tokens}")
        if not isinstance(text, str):
            raise BadAnswerError(f"the judge said nothing: {body[:200]!r}")
        return [self.answer.scores(text)]


def _data_url(picture: Image.Image) -> str:
    file = encode_picture(picture, image_format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file).decode("ascii")


@dataclass(kw_only=True, eq=False)
class Judge(RemoteReward):
    """What a vision language model makes of each image and its prompt, by an answer that is checked.

    Time limits, retries and several servers are those of RemoteReward: `concurrency` requests are in flight
    on each server, 429 and 5xx are asked again until `retry.give_up_s`, an answer without usable scores up to
    `retry.max_bad_answers` times.
    """

    urls: Sequence[str]
    """One or more servers of the same model, as clients of the API take them: "http://host:8000/v1"."""
    name: str = "judge"
    model: str
    """The model's name, as the server knows it; GET /v1/models lists them."""
    template: str = TEMPLATE
    """The question. "{prompt}" stands for the prompt."""
    answer: Answer = field(default_factory=JSONAnswer)
    """What the model must say: JSONAnswer() or LabelledAnswer(...)."""
    max_tokens: int = 512
    """Most tokens of an answer, >= 1."""
    reference: str = ""
    """Key of the metadata with a picture to compare with, which is shown first: a path, an image of Pillow,
    or (3, H, W) in [0, 1]. Empty: none."""
    api_key_variable: str = ""
    """Environment variable that holds the servers' key, which is sent as a bearer token. Empty: what
    ~/.netrc has."""
    concurrency: int = 8
    wire: WireFormat = field(init=False)
    batch_size: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, f"max_tokens={self.max_tokens} lets nothing be said; use 1 or more")
        self.wire = ChatFormat(
            model=self.model,
            template=self.template,
            answer=self.answer,
            max_tokens=self.max_tokens,
            reference=self.reference,
        )
        if isinstance(self.urls, Sequence) and not isinstance(self.urls, str):
            self.urls = [url.rstrip("/").removesuffix(ENDPOINT) + ENDPOINT for url in self.urls]
        if self.api_key_variable:
            self.headers = {**self.headers, "Authorization": f"Bearer {api_key(self.api_key_variable)}"}
        super().__post_init__()

    def check_prompt(self, prompt: str, metadata: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: for a prompt without its picture to compare with.
        """
        if self.reference:
            require_reference(prompt, metadata, key=self.reference)


# The words of CodeGoat24/UnifiedReward, on which the models were trained; of flow_grpo for "final".
_FINAL = LabelledAnswer(labels=(("final", "Final Score:"),), low=1.0, high=5.0)
_FINAL_QUESTION = """You are given a text caption and a generated image based on that caption. \
Your task is to evaluate this image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. \
Consider the accuracy of depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, \
color accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""
_AXES = LabelledAnswer(
    labels=(
        ("alignment", "Alignment Score (1-5):"),
        ("coherence", "Coherence Score (1-5):"),
        ("style", "Style Score (1-5):"),
    ),
    low=1.0,
    high=5.0,
)
_AXES_QUESTION = """You are presented with a generated image and its associated text caption. \
Your task is to analyze the image across multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, \
etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""
_QUESTIONS = {"axes": (_AXES_QUESTION, _AXES), "final": (_FINAL_QUESTION, _FINAL)}


@dataclass(kw_only=True, eq=False)
class UnifiedReward(Judge):
    """UnifiedReward's scores of an image, 1 to 5 (arXiv 2503.05236), from a server of one of its models."""

    declaration = Declaration(heads=_AXES.heads)

    name: str = "unified_reward"
    model: str = "UnifiedReward"
    """Its name on the server, where `vllm serve --served-model-name UnifiedReward` gives this one."""
    asks: str = "axes"
    """"axes": `alignment`, `coherence` and `style`, a head each (UnifiedReward-2.0); "final": one score of
    both caption and quality, as flow_grpo asks UnifiedReward-7b-v1.5, whose score it divides by 5."""
    template: str = field(default="", init=False)
    answer: Answer = field(default=_AXES, init=False)

    def __post_init__(self) -> None:
        if self.asks not in _QUESTIONS:
            raise unknown("question asks", self.asks, _QUESTIONS)
        self.template, self.answer = _QUESTIONS[self.asks]
        super().__post_init__()
