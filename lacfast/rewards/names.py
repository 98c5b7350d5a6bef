"""What a reward may be called: registered names and servers' URLs. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from typing import NamedTuple
from urllib.parse import urlsplit

from lacfast.config.checks import unknown

BUILT_IN: dict[str, str] = {
    "aesthetic": "lacfast.rewards.aesthetic:AestheticScore",
    "clip_score": "lacfast.rewards.clip:CLIPScore",
    "hpsv2": "lacfast.rewards.hpsv2:HPSv2",
    "image_reward": "lacfast.rewards.image_reward:ImageReward",
    "jpeg_compressibility": "lacfast.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "lacfast.rewards.jpeg:jpeg_incompressibility",
    "ocr": "lacfast.rewards.ocr:OCRAccuracy",
    "pickscore": "lacfast.rewards.clip:PickScore",
}
"""Reward name -> "module:callable", imported at first use; a class is made with its default settings."""

ENTRY_POINTS = "lacfast.rewards"
"""Group of the entry points by which installed packages name rewards of theirs, in the same form."""

_SERVER = re.compile(r"(?:([^=:/\s]+)=)?(?:(flow_grpo|unified_reward)\+)?(\w+://.*)")


class Server(NamedTuple):
    """A reward server as it is written: "http://host:port/path", "name=http://...", "flow_grpo+http://...",
    "unified_reward+http://..."."""

    name: str
    """What its scores are called: the name that is written, else all that is."""
    url: str
    speaks: str
    """"": our JSON; "flow_grpo": its format; "unified_reward": the chat API, as a UnifiedReward is asked."""


def registered_rewards() -> dict[str, str]:
    """Reward name -> "module:callable": the built-in ones, and those that installed packages name."""
    found = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return dict(sorted({**found, **BUILT_IN}.items()))


def server(entry: str) -> Server | None:
    """The server that `entry` names; None for one that names none.

    Raises:
        ValueError: for a URL that is no server's, or that has a password in it.
    """
    found = _SERVER.fullmatch(entry)
    if found is None:
        return None
    require_url(found[3])
    return Server(found[1] or entry, found[3], found[2] or "")


def require_servers(entries: Iterable[str]) -> None:
    """
    Raises:
        ValueError: when one of the entries is a URL that `server` refuses.
    """
    for entry in entries:
        server(entry)


def require_known(entries: Iterable[str]) -> None:
    """
    Raises:
        ValueError: for an entry that is neither registered nor "module:callable" nor a server.
    """
    for entry in entries:
        if server(entry) is None:
            reward_location(entry)


def reward_location(entry: str) -> str:
    """The "module:callable" that a reward is, or that its name stands for.

    Raises:
        ValueError: for a name that nobody has registered.
    """
    if ":" in entry:
        return entry
    if entry in BUILT_IN:
        return BUILT_IN[entry]
    # Once more where it is not among them: its package may have been installed since.
    for search in (_first_search, registered_rewards):
        if entry in (known := search()):
            return known[entry]
    remedy = "or pass a callable, 'package.module:callable', or the URL of a reward server"
    raise unknown("reward", entry, known, remedy)


@cache
def _first_search() -> dict[str, str]:
    # A search opens a file of every package that is installed, which takes 5 ms.
    return registered_rewards()


def require_url(url: str) -> None:
    """
    Raises:
        ValueError: for a URL that is no server's, or that has a password in it, which is not shown.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        shown = f"{parts.scheme}://...@{parts.netloc.rpartition('@')[2]}"
        raise ValueError(
            f"{shown} has a user name or a password in it, which logs would show and nothing sends; leave it "
            "out and write it into ~/.netrc, or pass RemoteReward(headers={'Authorization': ...})"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(url):
        raise ValueError(f"{url!r} is no server; write http://host:port/path")


def _has_port(url: str) -> bool:
    """Whether the port is a number, or the scheme's own."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False
