"""Credentials come from the user's netrc file, for the host that it names alone."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from refusals import Refusal

from lacfast.rewards.credentials import authorization


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "netrc"
    path.write_text(
        "machine gpu1 login me password secret\nmachine gateway login bearer password token\n"
        "default login anybody password anything\n"
    )
    monkeypatch.setenv("NETRC", str(path))
    return path


def test_a_login_is_basic_and_bearer_a_token(netrc: Path) -> None:
    assert authorization("gpu1") == "Basic " + base64.b64encode(b"me:secret").decode()
    assert authorization("gateway") == "Bearer token"


def test_the_default_entry_is_for_nobody_in_particular(netrc: Path) -> None:
    assert authorization("elsewhere") is None


def test_the_file_lies_in_the_home_directory(netrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NETRC")
    monkeypatch.setattr(Path, "home", lambda: netrc.parent)
    assert authorization("gpu1") is None
    netrc.rename(netrc.with_name(".netrc"))
    assert authorization("gpu1") is not None


def test_a_file_that_cannot_be_read_is_named_without_what_it_holds(
    netrc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc.write_text("machine gpu1 login me\nsecret secret\n")
    with Refusal(
        "netrc, line ",
        cause="A netrc file that is not in that format.",
        remedy="write 'machine HOST login NAME password SECRET'",
    ).raised() as caught:
        authorization("gpu1")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("NETRC", "nowhere")
    with Refusal(
        "NETRC=nowhere is no file",
        cause="A netrc file that the environment names and that is not there.",
        remedy="write the credentials there, or unset it",
    ).raised():
        authorization("gpu1")
