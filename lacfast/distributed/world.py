"""The processes that train one model together, its ranks; a world of one calls no collective."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lacfast.distributed.buckets import in_buckets
from lacfast.distributed.share import Share

Entry = TypeVar("Entry")

TIMEOUT = timedelta(minutes=45)
"""How long a rank waits for the others: longer than for a reward that hangs, which is half an hour."""
END_SECONDS = 2.0
"""How long a rank that fails waits to hear whether another one fails for the same reason."""
TELL_SECONDS = 1.0
"""How long a rank stays that leaves the word to another one."""
_LOST = "lost"


class LostRankError(RuntimeError):
    """Another rank ended or hangs, so a sum over all of them never comes."""


class ToldElsewhereError(RuntimeError):
    """This process ends for a reason that another rank has told."""


@dataclass
class Traffic:
    """What this rank has sent to others, by the algorithms that are optimal for large tensors."""

    num_bytes: float = 0.0

    def metrics(self, before: float) -> dict[str, int]:
        """Bytes since there were `before`; {} for none."""
        sent = round(self.num_bytes - before)
        return {"traffic_bytes": sent} if sent else {}


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    What takes tensors, entries or values is collective: all ranks call it, in the same order, or all wait.
    """

    rank: int = 0
    size: int = 1
    _store: Any = field(default=None, repr=False, compare=False)
    """Where ranks leave what they are about to do, so that the others can name who is missing."""
    traffic: Traffic = field(default_factory=Traffic, repr=False, compare=False)
    timeout: timedelta = field(default=TIMEOUT, repr=False, compare=False)
    """After which a rank gives up waiting for the others."""
    _members: tuple[int, ...] = field(default=(), repr=False)
    """Their ranks among all that were started; empty: these are all."""
    _group: Any = field(default=None, repr=False, compare=False)
    """The process group of some; None: that of all."""

    @staticmethod
    def current() -> World:
        """The world of the default process group; one process alone without a group.

        Raises:
            ValueError: for one of several processes of a launcher that has joined no group: all of them would
                train the same, and write over each other.
        """
        if distributed.is_available() and distributed.is_initialized():
            return _JOINED or World(distributed.get_rank(), distributed.get_world_size())
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1:
            raise ValueError(
                f"this is one of {size} processes of a launcher, and no process group joins them; train with "
                f"`torchrun --nproc-per-node {size} -m lacfast train ...`, or enter "
                "lacfast.distributed.joined() before the trainer is made"
            )
        return ALONE

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes, logs and shows: of all, and not of some."""
        return self._among_all(self.rank) == 0

    def split(self, count: int) -> World:
        """The world of the first `count` ranks or of the others, whichever this one is in; traffic is one."""
        parts = tuple(range(count)), tuple(range(count, self.size))
        groups = [distributed.new_group(list(part), timeout=self.timeout) for part in parts]
        own = int(self.rank >= count)
        return replace(
            self,
            rank=parts[own].index(self.rank),
            size=len(parts[own]),
            _members=parts[own],
            _group=groups[own],
        )

    def _among_all(self, rank: int) -> int:
        """What a rank of this world is among all that were started."""
        return self._members[rank] if self._members else rank

    def able_to_share(self, total: int, setting: str = "batch_size") -> World:
        """This world.

        Raises:
            ValueError: for a batch of `total` that has fewer rows than there are ranks, as `setting` says.
        """
        if 0 < total < self.size:
            raise ValueError(
                f"a batch of {total} is fewer than the {self.size} ranks; raise {setting}, or start fewer "
                "processes"
            )
        return self

    def share(self, total: int) -> Share:
        """This rank's rows of a batch of `total`; the first ranks have one more where it does not divide.

        Raises:
            ValueError: for fewer rows than ranks.
        """
        self.able_to_share(total)
        each, larger = divmod(total, self.size)
        first = self.rank * each + min(self.rank, larger)
        return Share(first, each + (self.rank < larger), total, self.size)

    def require_shards(self, count: int) -> None:
        """
        Raises:
            ValueError: for weights that cannot be divided over `count` of these ranks.
        """
        if self.size % count:
            raise ValueError(
                f"shard={count} does not divide the {self.size} ranks; start a multiple of {count} processes "
                f"with torchrun --nproc-per-node {count}, or choose a divisor of {self.size}"
            )

    def sum_(self, tensors: Sequence[Tensor], what: str, *, maxima: Sequence[Tensor] = ()) -> None:
        """Add tensors over all ranks, in place and in their own dtypes.

        Args:
            tensors: what is added.
            what: they are, for messages.
            maxima: () each, of which the largest of all ranks is taken on the same way.
        """
        if self.size == 1:
            return
        # Every rank has a place of its own in the sum.
        places = [largest.new_zeros(self.size) for largest in maxima]
        for place, largest in zip(places, maxima, strict=True):
            place[self.rank] = largest
        everything = [*tensors, *places]
        self.traffic.num_bytes += 2 * (self.size - 1) / self.size * sum(each.nbytes for each in everything)
        with self.waiting(what):
            in_buckets(everything, partial(distributed.all_reduce, group=self._group))
        for place, largest in zip(places, maxima, strict=True):
            largest.copy_(place.amax())

    def rows(self, own: Tensor, what: str, *, dim: int = 0) -> Tensor:
        """The rows of all ranks in their order, along `dim`, of which ranks may have different numbers."""
        if self.size == 1:
            return own
        padded, counts = self._padded(own.movedim(dim, 0), what)
        self.traffic.num_bytes += (self.size - 1) * padded.nbytes
        parts = [torch.empty_like(padded) for _ in counts]
        with self.waiting(what):
            distributed.all_gather(parts, padded, group=self._group)
        return _joined_rows(parts, counts, dim)

    def rows_on_first(self, own: Tensor, what: str, *, dim: int = 0) -> Tensor:
        """The rows of all ranks in their order on the first rank, along `dim`; on another its own."""
        if self.size == 1:
            return own
        padded, counts = self._padded(own.movedim(dim, 0), what)
        parts = [torch.empty_like(padded) for _ in counts] if self.rank == 0 else None
        self.traffic.num_bytes += padded.nbytes if self.rank else 0
        with self.waiting(what):
            distributed.gather(padded, parts, dst=self._among_all(0), group=self._group)
        if parts is None:
            return own
        return _joined_rows(parts, counts, dim)

    def _padded(self, rows: Tensor, what: str) -> tuple[Tensor, list[int]]:
        """Rows of the same number on all ranks, and how many of each rank count."""
        counts = self.entries([len(rows)], what)
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        return padded, counts

    def entries(self, own: list[Entry], what: str) -> list[Entry]:
        """The entries of all ranks in their order; they are pickled."""
        if self.size == 1:
            return own
        parts: list[list[Entry]] = [[] for _ in range(self.size)]
        self.traffic.num_bytes += (self.size - 1) * len(pickle.dumps(own))
        with self.waiting(what):
            distributed.all_gather_object(parts, own, group=self._group)
        return [entry for part in parts for entry in part]

    def of_first(self, value: Entry, what: str) -> Entry:
        """The value that the first rank has, as of a clock or a directory."""
        return self.entries([value], what)[0]

    def wait(self, what: str) -> None:
        """Go on when all ranks are here."""
        self.entries([], what)

    def copy_from_first_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Give tensors the first rank's values, in place."""
        if self.size == 1:
            return
        if self.rank < self.size - 1:  # Each but the last hands them on to the next.
            self.traffic.num_bytes += sum(each.nbytes for each in tensors)
        with self.waiting(what):
            in_buckets(tensors, partial(distributed.broadcast, src=self._among_all(0), group=self._group))

    def meet(self) -> None:
        """Go on when all ranks have joined: one that leaves at once would break the others' joining.

        Raises:
            LostRankError: when some never come.
        """
        if self._store is None:
            return
        with self.waiting("the start"):
            count = self._store.add("joined", 1)
            # A process may join again later.
            key = f"all joined/{(count - 1) // self.size}"
            if count % self.size == 0:
                self._store.set(key, "")
            self._store.wait([key], self.timeout)

    def is_told_elsewhere(self, error: Exception) -> bool:
        """Whether another rank ends with the same error, or with the one that this rank's is due to.

        The first rank tells what all of them say; a rank that lost another leaves the word to it. Waits
        END_SECONDS at most.
        """
        if self._store is None:
            return False
        is_lost = isinstance(error, LostRankError)
        own = _LOST if is_lost else f"{type(error).__name__}: {error}"
        self._say("end", own)
        asked = [rank for rank in range(self.size) if rank != self.rank] if is_lost else [0] * (self.rank > 0)
        if not asked and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # What the others read is this process's.
            time.sleep(END_SECONDS / 4)
        deadline = time.monotonic() + END_SECONDS
        while asked and time.monotonic() < deadline:
            for rank in list(asked):
                said = self._said("end", rank)
                if said is None:
                    continue
                asked.remove(rank)
                if (said == own and rank < self.rank) or (is_lost and said != _LOST):
                    return True
            time.sleep(END_SECONDS / 50)
        return False

    @contextmanager
    def waiting(self, what: str, *, aloud: bool = True) -> Iterator[None]:
        """Say where a rank waits, and who is missing when the others do not come.

        Args:
            what: it waits for.
            aloud: the others can tell where this rank was last.

        Raises:
            LostRankError: out of the block.
        """
        if aloud:
            self._say("at", what)
        try:
            yield
        except torch.OutOfMemoryError:
            # It is an error of this rank.
            raise
        except RuntimeError as error:
            own = self._among_all(self.rank)
            raise LostRankError(
                f"rank {own} waited for the others at {what}, and one of them ended or hangs"
                f"{self._elsewhere(what)}; its own message comes first and says why"
            ) from error

    def _elsewhere(self, what: str) -> str:
        """What the ranks that are not here did last."""
        known = [(rank, self._said("at", rank)) for rank in range(self.size)]
        others = [
            f"rank {self._among_all(rank)} was last at {where}"
            for rank, where in known
            if where not in (None, what)
        ]
        return f" ({', '.join(others)})" if others else ""

    def _say(self, kind: str, what: str) -> None:
        """Leave something in the store, unless it is gone with the rank that held it."""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(f"{kind}/{self._among_all(self.rank)}", what)

    def _said(self, kind: str, rank: int) -> str | None:
        """What a rank left in the store; None for nothing, or when the store is gone."""
        key = f"{kind}/{self._among_all(rank)}"
        try:
            if self._store is None or not self._store.check([key]):
                return None
            said: str = self._store.get(key).decode()
            return said
        except RuntimeError:
            return None


ALONE = World()
"""The world of one process."""
_JOINED: World | None = None


@contextmanager
def joined(timeout: timedelta = TIMEOUT, *, takes_gpus: bool = True) -> Iterator[World]:
    """Join the processes of torchrun, or of what sets the same variables, for the block.

    A process that no launcher started is a world of one.

    Args:
        timeout: after which a rank gives up waiting for the others.
        takes_gpus: each rank takes the GPU of its LOCAL_RANK where the machine has any; else tensors that
            ranks share are on the CPU.

    Raises:
        ValueError: for variables that name no process, or fewer GPUs on the machine than processes.
        LostRankError: out of the block, when another rank ended or hangs.
    """
    global _JOINED
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or (distributed.is_available() and distributed.is_initialized()):
        yield World.current()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start with torchrun, which sets "
            "all, or unset WORLD_SIZE for one process"
        )
    backend = "gloo"
    if takes_gpus and torch.cuda.is_available():
        local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= devices:
            raise ValueError(
                f"process {local} of this machine has no GPU, for there are {devices}; start with "
                f"--nproc-per-node {devices}"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    # torch exports these, but does not tell type checkers.
    stores: Any = distributed
    store, rank, size = next(stores.rendezvous("env://", timeout=timeout))
    _JOINED = World(rank, size, stores.PrefixStore("lacfast", store), timeout=timeout)
    distributed.init_process_group(
        backend, store=stores.PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout
    )
    try:
        _JOINED.meet()
        yield _JOINED
    except Exception as error:
        if _JOINED.is_told_elsewhere(error):
            # Launchers end all where one ends: the first to end is to be the one that tells.
            time.sleep(TELL_SECONDS)
            raise ToldElsewhereError(str(error)) from error
        raise
    finally:
        _JOINED = None
        distributed.destroy_process_group()


def _joined_rows(parts: Sequence[Tensor], counts: Sequence[int], dim: int) -> Tensor:
    """The first `counts` rows of each part, as rows along `dim`."""
    rows = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return rows.movedim(0, dim).contiguous()
