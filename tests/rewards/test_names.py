"""A server is told from a name, has a name of its own where one is written, and shows no password."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import Refusal

from lacfast.rewards.names import server
from lacfast.runs.config import EvaluationRun, RunConfig, SteeringRun


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("http://host:80/score", ("http://host:80/score", "http://host:80/score", "")),
        ("https://host/a?b=http://c", ("https://host/a?b=http://c", "https://host/a?b=http://c", "")),
        ("flow_grpo+http://host", ("flow_grpo+http://host", "http://host", "flow_grpo")),
        ("geneval=flow_grpo+http://host", ("geneval", "http://host", "flow_grpo")),
        ("taste=http://10.0.0.1:8000", ("taste", "http://10.0.0.1:8000", "")),
        ("taste=unified_reward+http://host/v1", ("taste", "http://host/v1", "unified_reward")),
        ("pickscore", None),
        ("my_package.rewards:redness", None),
    ],
)
def test_servers_have_the_name_that_is_written_or_all_that_is(
    entry: str, expected: tuple[str, str, str] | None
) -> None:
    assert server(entry) == expected


@pytest.mark.parametrize("entry", ["ftp://host", "taste=http://", "http://host:port", "http://host:99999"])
def test_what_looks_like_a_url_must_be_a_servers(entry: str) -> None:
    with pytest.raises(ValueError, match="is no server; write http://host:port/path"):
        server(entry)


PASSWORD = "taste=http://me:secret@host:80/score"
SECRET = Refusal(
    "http://...@host:80 has a user name or a password in it",
    cause="Credentials in a reward server's URL, which settings, logs and checkpoints would keep.",
    remedy="write it into ~/.netrc, or pass RemoteReward(headers={'Authorization': ...})",
)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RunConfig(out="o", model="m", prompts="p", rewards=((PASSWORD, 1.0),)),
        lambda: RunConfig(
            out="o", model="m", prompts="p", rewards=(("shapes", 1.0),), evaluation_rewards=(PASSWORD,)
        ),
        lambda: EvaluationRun(source="m", prompts="p", rewards=(PASSWORD,)),
        lambda: SteeringRun(source="m", prompts=("p",), out=Path("o"), gold=(PASSWORD,)),
    ],
)
def test_settings_cannot_hold_a_password(make: object) -> None:
    assert callable(make)
    with SECRET.raised() as caught:
        make()
    assert "secret" not in str(caught.value)
