"""Ranks that a command starts by itself, on the processor of its machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from torch import distributed

from lacfast.distributed import LostRankError, World, joined
from lacfast.runs.endings import ending
from lacfast.runtime.signals import ENDING

_HOST = "127.0.0.1"
_TELL_SECONDS = 10.0
"""How long a rank that is lost has to say why."""


@contextmanager
def joined_by(count: int, work: Callable[..., object], *arguments: Any) -> Iterator[World]:
    """Run `work(*arguments)` as the other ranks of a group whose first one is this process, for the block.

    They end with the block: when it fails they are stopped, so they are to write nothing. A signal that asks
    to end is this process's to answer.

    Args:
        count: processes with this one; 1 starts none.
        work: a function of a module, since the processes are new interpreters.
        arguments: what they are sent.

    Raises:
        ValueError: in a process that is one of several already.
        LostRankError: out of the block, when another rank ended or hangs.
    """
    if World.current().size > 1:
        raise ValueError("this process is a rank of a launcher; start it alone, it starts the others itself")
    if count == 1:
        yield World.current()
        return
    # The store takes a free port, and is there before any rank asks for it.
    stores: Any = distributed
    store = stores.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    variables = _variables(store.port, count)
    context = multiprocessing.get_context("spawn")
    others: list[BaseProcess] = [
        context.Process(target=_rank, args=(rank, variables, work, arguments), daemon=True)
        for rank in range(1, count)
    ]
    try:
        for process in others:
            process.start()
        with _set(variables | {"RANK": "0"}), joined(takes_gpus=False) as world:
            try:
                yield world
            except LostRankError:
                for process in others:
                    process.join(_TELL_SECONDS)
                raise
            except BaseException:
                # Before the group is left: they would tell that this rank is lost.
                _stop(others)
                raise
    finally:
        _stop(others)


def _variables(port: int, count: int) -> dict[str, str]:
    """What torchrun would set, but for the rank."""
    found = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    # A laptop's name may resolve to a network that is gone; these never leave the machine.
    interfaces = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return found | ({"GLOO_SOCKET_IFNAME": interfaces[0]} if interfaces else {})


def _rank(rank: int, variables: Mapping[str, str], work: Callable[..., object], arguments: Any) -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    os.environ |= {**variables, "RANK": str(rank)}
    try:
        with joined(takes_gpus=False):
            work(*arguments)
    except Exception as error:
        if (found := ending(error)) is None:
            raise
        if found.line:
            print(f"lacfast: {found.line}", file=sys.stderr)
        sys.exit(found.code)


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment, for the block."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name)
        os.environ |= {name: before[name] for name in variables if name in before}


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None:
            process.kill()
            process.join()
