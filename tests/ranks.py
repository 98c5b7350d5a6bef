"""Functions run by several processes, as the ranks of one gloo group or as a launcher starts them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tiny_backbones import fitted_codec
from torch import distributed


def on_ranks(size: int, work: Callable[[], Any], directory: Path) -> list[Any]:
    """What `work` returns on each of `size` ranks of a group.

    Args:
        size: processes; 1 runs here, without a group.
        work: returns what torch can save.
        directory: for the meeting and the results.
    """
    if size == 1:
        return [work()]
    directory.mkdir(parents=True, exist_ok=True)
    ranks = _processes(size, _in_group, work, directory)
    for process in ranks:
        process.join(timeout=240)
    assert [process.exitcode for process in ranks] == [0] * size
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(size)]


def together(size: int, works: Mapping[str, Callable[[], Any]], directory: Path) -> dict[str, list[Any]]:
    """What each of several works returns on each rank, one after the other in one group: see `on_ranks`."""
    ranks = on_ranks(size, lambda: {name: work() for name, work in works.items()}, directory)
    return {name: [rank[name] for rank in ranks] for name in works}


def started(
    size: int, work: Callable[[], Any], directory: Path, *, has_agent: bool = True
) -> tuple[list[BaseProcess], distributed.TCPStore | None]:
    """Processes with the variables of torchrun, each of which leaves what `work` returns in RANK.pt.

    They meet in the store, which the caller keeps until they have ended. Without an agent, as with srun, the
    first rank has it.
    """
    # As with torchrun, the store outlives every rank.
    store: distributed.TCPStore | None
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = str(store.port)
    if not has_agent:
        store = None

    def launched(rank: int, size: int, work: Callable[[], Any], directory: Path) -> None:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": str(has_agent), "TORCHELASTIC_RESTART_COUNT": "0"}
        torch.save(work(), directory / f"{rank}.pt")

    return _processes(size, launched, work, directory), store


def _processes(size: int, target: Callable[..., None], work: Any, directory: Path) -> list[BaseProcess]:
    # A forked process does not import torch again, nor fits what tiny backbones share.
    fitted_codec()
    context = multiprocessing.get_context("fork")
    ranks: list[BaseProcess] = [
        context.Process(target=target, args=(rank, size, work, directory)) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks


def _in_group(rank: int, size: int, work: Callable[[], Any], directory: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{directory / 'meeting'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    torch.save(work(), directory / f"{rank}.pt")
    distributed.destroy_process_group()
