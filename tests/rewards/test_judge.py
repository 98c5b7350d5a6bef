"""A vision language model judges over the chat API; only a whole answer in its range is a score."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import ChatServer, said
from PIL import Image
from refusals import Refusal

from lacfast.rewards.image_files import to_uint8
from lacfast.rewards.judge import JSONAnswer, Judge, LabelledAnswer, UnifiedReward
from lacfast.rewards.registry import RewardSet
from lacfast.rewards.remote import RetryConfig
from lacfast.rewards.reward import RewardError

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["1", "2", "3"]
METADATA: list[dict[str, Any]] = [{}, {}, {}]
AXES = "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 3\nStyle Score (1-5): 4.5"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    server = ChatServer()
    yield server
    server.close()


def judge(server: ChatServer, kind: type[Judge] = Judge, **settings: Any) -> Judge:
    """One that waits for nothing: its pauses pass at once."""
    retry = RetryConfig(
        **{"timeout_s": 5.0, "max_bad_answers": 2, "jitter": 0.0, **settings.pop("retry", {})}
    )
    now = [0.0]

    def pause(stopped: threading.Event, seconds: float) -> None:
        now[0] += seconds

    given = {"model": "vlm", **settings}
    return kind(urls=[server.url], retry=retry, pause=pause, clock=lambda: now[0], **given)


def score(reward: Judge, count: int = 3) -> dict[str, torch.Tensor]:
    return RewardSet.create(reward).score(IMAGES[:count], PROMPTS[:count], METADATA[:count])


def test_each_image_is_judged_alone_with_its_own_prompt(server: ChatServer) -> None:
    assert score(judge(server))["judge"].tolist() == [1.0, 2.0, 3.0]
    assert len(server.requests) == 3
    for request in server.requests:
        (message,) = request["messages"]
        picture, question = message["content"]
        prompt = question["text"].partition("Prompt: ")[2][0]
        head, _, file = picture["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))
        assert np.array_equal(shown, to_uint8(IMAGES)[PROMPTS.index(prompt)])
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("vlm", 0, 512)
        schema = request["response_format"]["json_schema"]["schema"]
        assert schema["properties"] == {"score": {"type": "number", "minimum": 0.0, "maximum": 10.0}}
    assert set(server.paths) == {"/v1/chat/completions"}


def test_several_criteria_are_several_heads(server: ChatServer) -> None:
    server.then = said('{"light": 2, "taste": 7.5}')
    scores = score(judge(server, answer=JSONAnswer(criteria=("taste", "light"))), 1)
    assert {name: values.tolist() for name, values in scores.items()} == {"taste": [7.5], "light": [2.0]}


def test_a_unified_reward_is_asked_in_its_own_words(server: ChatServer) -> None:
    server.then = said(AXES)
    scores = score(judge(server, UnifiedReward, model="UnifiedReward"), 1)
    assert {name: round(float(values), 3) for name, values in scores.items()} == {
        "alignment": 2.695,
        "coherence": 3.0,
        "style": 4.5,
    }
    server.then = said("cup (object): 1\nFinal Score: 4.25")
    final = judge(server, UnifiedReward, model="UnifiedReward", asks="final")
    assert score(final, 1)["unified_reward"].tolist() == [4.25]
    for request in server.requests:
        question = request["messages"][0]["content"][-1]["text"]
        assert question.endswith("Text Caption: [1]")
        assert "response_format" not in request


def test_the_picture_to_compare_with_is_shown_first(server: ChatServer) -> None:
    black = torch.zeros(3, 2, 2)
    reward = judge(server, reference="before")
    RewardSet.create(reward).score(IMAGES[:1], PROMPTS[:1], [{"before": black}])
    first, second, _ = server.requests[0]["messages"][0]["content"]
    files = [base64.b64decode(each["image_url"]["url"].partition(",")[2]) for each in (first, second)]
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(2, 2), (8, 8)]
    with pytest.raises(ValueError, match="lack 'before', the picture to compare with"):
        reward.check_prompt("1", {})


def test_at_most_so_many_requests_are_in_flight(server: ChatServer) -> None:
    server.delay_s = 0.05
    score(judge(server, concurrency=2))
    assert server.most_at_once == 2


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ([(429, b"slow down")], 2),
        ([(500, b"CUDA out of memory"), (503, b"")], 3),
        ([said("I would say 7.")], 2),
        ([said('{"score": 11}')], 2),
        ([(200, b"<html>")], 2),
    ],
)
def test_what_may_pass_is_asked_again(
    server: ChatServer, answers: list[tuple[int, bytes]], asked: int
) -> None:
    server.answers = list(answers)
    assert score(judge(server), 1)["judge"].tolist() == [1.0]
    assert len(server.requests) == asked


def test_a_server_that_says_nothing_is_left_after_its_time(server: ChatServer) -> None:
    server.delay_s = 1.0
    reward = judge(server, retry={"timeout_s": 0.05, "give_up_s": 0.0})
    with pytest.raises(RewardError, match=r"no whole answer within 0.05 s.*for prompts \['1'\]"):
        score(reward, 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (said("7 of 10"), "the answer is no JSON that can be read: '7 of 10'"),
        (said('{"rating": 7}'), r"the judge's answer is no object of \['score'\]: '{\"rating\": 7}'"),
        (said('{"score": 7, "why": ""}'), r"the judge's answer is no object of \['score'\]"),
        (said('{"score": 10.5}'), "the judge's score 10.5 is no number from 0 to 10"),
        (said('{"score": NaN}'), "the judge's score nan is no number from 0 to 10"),
        (said('{"score": true}'), "the judge's score True is no number from 0 to 10"),
        (said('{"score": "7"}'), "the judge's score '7' is no number from 0 to 10"),
        (said('{"sco', end="length"), "the judge's answer was cut off; raise max_tokens=512"),
        (said(None), "the judge said nothing"),
        ((200, b'{"choices": []}'), "the answer is no chat completion"),
        ((200, b"[]"), "the answer is no chat completion"),
        ((401, b"no key"), "HTTP status 401, no key"),
    ],
)
def test_what_is_no_verdict_is_an_error_that_shows_it(
    server: ChatServer, answer: tuple[int, bytes], message: str
) -> None:
    server.then = answer
    with pytest.raises(RewardError, match=message) as caught:
        score(judge(server), 1)
    assert "reward 'judge' raised" in str(caught.value)
    assert "for prompts ['1']" in str(caught.value)
    assert len(server.requests) == 2


@pytest.mark.parametrize("text", ["Style Score (1-5): 4", AXES + "\nStyle Score (1-5): 2", AXES + "x" * 9])
def test_a_label_must_stand_once(text: str) -> None:
    answer = LabelledAnswer(labels=(("style", "Style Score (1-5):"),), low=1, high=5)
    if text.count("Style Score") == 1:
        assert answer.scores(text) in ((4.0,), (4.5,))
    else:
        with pytest.raises(ValueError, match=r"has 2 numbers behind 'Style Score \(1-5\):', not one"):
            answer.scores(text)
    with pytest.raises(ValueError, match="has 0 numbers behind"):
        answer.scores("fine")


def test_the_key_comes_from_the_environment_and_is_not_shown(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    reward = judge(server, api_key_variable="JUDGE_KEY")
    score(reward, 1)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(reward)
    monkeypatch.delenv("JUDGE_KEY")
    with Refusal(
        "the environment has no JUDGE_KEY",
        cause="A judge whose key is not in the environment.",
        remedy="export JUDGE_KEY=... with the server's key",
    ).raised():
        judge(server, api_key_variable="JUDGE_KEY")


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (
            lambda: JSONAnswer(low=1.0, high=1.0),
            Refusal(
                "low=1 and high=1 leave no score",
                cause="A judge's scores in an empty range.",
                remedy="give low below high",
            ),
        ),
        (
            lambda: JSONAnswer(criteria=()),
            Refusal(
                "criteria=() asks for no score",
                cause="A judge that is asked for nothing.",
                remedy="name one or more",
            ),
        ),
        (
            lambda: UnifiedReward(urls=["http://gpu1/v1"], asks="pairs"),
            Refusal(
                "unknown question asks 'pairs'",
                cause="A question that UnifiedReward was not trained on.",
                remedy="known: axes, final",
            ),
        ),
        (
            lambda: Judge(urls=["http://gpu1/v1"], model="vlm", max_tokens=0),
            Refusal(
                "max_tokens=0 lets nothing be said",
                cause="A judge that may not say a word.",
                remedy="use 1 or more",
            ),
        ),
    ],
)
def test_settings_without_a_verdict_are_refused(make: Callable[[], object], refused: Refusal) -> None:
    with refused.raised():
        make()


def test_servers_are_written_as_clients_of_the_api_have_them() -> None:
    for written in ("http://gpu1/v1", "http://gpu1/v1/", "http://gpu1/v1/chat/completions"):
        assert Judge(urls=[written], model="vlm").urls == ["http://gpu1/v1/chat/completions"]
    rewards = RewardSet.create({"unified_reward+http://gpu1/v1": 0.5})
    assert rewards.names == ["alignment", "coherence", "style"]
    assert json.dumps(rewards.weights.tolist()) == "[0.5, 0.5, 0.5]"
