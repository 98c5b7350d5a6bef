"""What to draw: prompts with their metadata, in an order that depends on (seed, iteration) only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from lacfast.config import TrainConfig
from lacfast.config.checks import require, unknown
from lacfast.distributed import Share
from lacfast.seeds import derived_seed


class PromptLike(Protocol):
    """A caption and what a reward needs to judge an image of it."""

    @property
    def text(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...


PromptEntry = str | PromptLike | Mapping[str, Any]
"""A caption, an object with `text` and `metadata`, or a row such as {"prompt": ..., anything else}."""
PromptSource = str | Path | Iterable[PromptEntry] | Callable[[], Iterable[PromptEntry]]
"""Entries, or a file, directory or function that `load_prompts` reads."""

_FORMATS = (
    "a .txt file (one prompt per line), a .jsonl file (one {'prompt': ..., ...} per line), a .parquet file, "
    "a directory that datasets.save_to_disk wrote, or hub:OWNER/NAME; FILE,column=NAME says what holds them"
)
HUB = "hub:"
"""What the name of a data set of the hub begins with."""
_COLUMN = ",column="


@dataclass(frozen=True)
class PromptSet:
    """Prompts and their metadata, index by index."""

    texts: list[str]
    metadata: list[dict[str, Any]]

    @staticmethod
    def create(prompts: PromptSet | PromptSource) -> PromptSet:
        """The prompts that `load_prompts` reads, by its default column."""
        return load_prompts(prompts)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> PromptSet:
        return PromptSet([self.texts[row] for row in rows], [self.metadata[row] for row in rows])

    def of_share(self, share: Share) -> PromptSet:
        """The prompts of one rank's rows."""
        return self.take(range(share.first, share.first + share.count))

    def split(self, size: int) -> Iterator[PromptSet]:
        """Parts of `size` prompts in their order, the last one smaller."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))

    def draw(self, count: int, *, seed: int, iteration: int, repeats: int = 1) -> PromptSet:
        """`count` prompts of an iteration, each `repeats` times in a row; every pass is a new permutation."""
        first = iteration * count
        rows = self._shuffled(range(first, first + count), seed)
        return self.take([row for row in rows for _ in range(repeats)])

    def cycle(self, count: int) -> PromptSet:
        """`count` prompts, always the same ones, each as often as any other up to one.

        All in their order as often as they fit, then some in their order, drawn by a fixed shuffle: the first
        ones of a sorted file would stand for themselves alone.
        """
        passes, rest = divmod(count, len(self))
        return self.take([*range(len(self))] * passes + sorted(self._shuffled(range(rest), 0)))

    def _shuffled(self, positions: range, seed: int) -> list[int]:
        """Rows at `positions` of an endless list of permutations, one after the other."""
        orders: dict[int, list[int]] = {}
        for epoch in {position // len(self) for position in positions}:
            generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
            orders[epoch] = torch.randperm(len(self), generator=generator).tolist()
        return [orders[position // len(self)][position % len(self)] for position in positions]


@dataclass(frozen=True)
class Draws:
    """What each rollout and evaluation of a run draws: all is known from its start."""

    prompts: PromptSet
    """What training and value pretraining draw from."""
    held_out: PromptSet
    """What evaluations draw from, and the rollout that measures value pretraining."""
    config: TrainConfig

    def training(self, iteration: int) -> PromptSet:
        """The prompts of an iteration, one per trajectory."""
        return self._drawn(iteration, self.config.seed)

    def pretraining(self, iteration: int) -> PromptSet:
        """The prompts of an iteration of value pretraining, in an order of their own."""
        return self._drawn(iteration, self.config.seed + 1)

    def selection(self) -> PromptSet:
        """Held-out prompts of the rollout that measures value pretraining, one per trajectory."""
        settings = self.config.pretrain
        # The floor needs every prompt twice.
        distinct = max(settings.held_out_samples // 2, 1) if settings.completions else len(self.held_out)
        return self.held_out.cycle(min(distinct, len(self.held_out))).cycle(settings.held_out_samples)

    def evaluation(self, samples: int | None = None) -> PromptSet:
        """The held-out prompts of every evaluation, `samples` of them; None: config.eval_samples."""
        return self.held_out.cycle(self.config.eval_samples if samples is None else samples)

    def upcoming(
        self, iteration: int, *, evaluated: int = -1, samples: bool = True, judges: bool = True
    ) -> Iterator[PromptSet]:
        """What training draws from an iteration on, in the order of its work; `evaluated` is not again.

        A rank that learns what others sample has `samples` False, one of these others `judges` False.
        """
        config = self.config
        for number in range(iteration, config.iterations + 1):
            if judges and config.eval_every and number % config.eval_every == 0 and number != evaluated:
                yield self.evaluation()
            if samples and number < config.iterations:
                yield self.training(number)

    def _drawn(self, iteration: int, seed: int) -> PromptSet:
        repeats = self.config.samples_per_prompt
        count = self.config.batch_size // repeats
        return self.prompts.draw(count, seed=seed, iteration=iteration, repeats=repeats)


def load_prompts(source: PromptSet | PromptSource, *, column: str = "prompt") -> PromptSet:
    """The prompts of a file, a directory, a function without arguments, or of entries in memory.

    Text: one prompt per line, blank lines are skipped. JSONL: one object per line; GenEval's
    `evaluation_metadata.jsonl` is one. A `.parquet` file needs pyarrow, a `datasets` directory datasets, and
    so does a data set of the hub, "hub:OWNER/NAME,split=test,column=Prompt", see HubDataset.
    A whole row becomes the prompt's metadata, so that a reward or its server finds every key.

    Args:
        source: where the prompts are; a path may end in ",column=NAME", which wins over `column`.
        column: the key or column that holds the caption.

    Raises:
        ValueError: for a path that does not exist, an unknown format, a column of lines of text, a data set
            that cannot be loaded, or a bad line, which is named by file and number.
        ImportError: when the format's optional package is missing, with the command that installs it.
    """
    if isinstance(source, PromptSet):
        return source
    if isinstance(source, str) and source.startswith(HUB):
        found = HubDataset.named(source.removeprefix(HUB), column)
        return _collected(found.rows(), column=found.column, origin=source)
    if isinstance(source, str | Path):
        path, named = path_and_column(str(source))
        column = named or column
        if named and path.suffix.lower() == ".txt":
            raise ValueError(f"column={named} would be ignored: {path} has a prompt per line; leave it out")
        return _collected(_read(path, column), column=column, origin=str(source))
    entries = source() if callable(source) else source
    origin = getattr(source, "__name__", "") if callable(source) else ""
    return _collected(
        ((f"entry {index}", entry) for index, entry in enumerate(entries)), column=column, origin=origin
    )


def path_and_column(source: str) -> tuple[Path, str]:
    """The two of "FILE,column=NAME"; "" where no column is named."""
    path, comma, column = source.rpartition(_COLUMN)
    return (Path(path), column) if comma and path and column else (Path(source), "")


def _read(path: Path, column: str) -> Iterator[tuple[str, PromptEntry]]:
    """(where it stands, entry) of a path."""
    if path.is_dir():
        return _read_dataset(path, column)
    if not path.is_file():
        raise ValueError(f"there is no prompt file {str(path)!r}; pass {_FORMATS}, or a list of prompts")
    readers = {".txt": _read_text, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"cannot read prompts from {str(path)!r}: its ending says no format; pass {_FORMATS}"
        )
    return readers[path.suffix.lower()](path)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(file:number, line) of the lines that are not blank."""
    # A byte order mark at the start of the file is no part of the first prompt.
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}; convert it, say by iconv") from error


def _read_text(path: Path) -> Iterator[tuple[str, PromptEntry]]:
    yield from _lines(path)


def _read_json_lines(path: Path) -> Iterator[tuple[str, PromptEntry]]:
    for place, line in _lines(path):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error}); write one object per line") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: {line[:80]} is no object; write {{'prompt': ..., ...}}")
        yield place, _checked_geneval(place, entry)


def _checked_geneval(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row; a GenEval clause that its server could not read is found here and not after a rollout."""
    for key in ("include", "exclude") if "tag" in row else ():
        clauses = row.get(key, [])
        good = isinstance(clauses, list) and all(
            isinstance(clause, dict) and "class" in clause and isinstance(clause.get("count"), int)
            for clause in clauses
        )
        if not good:
            raise ValueError(
                f"{place}: {key!r} is {clauses!r}; GenEval wants a list of "
                "{'class': str, 'count': int, ...}"
            )
    return row


def _read_parquet(path: Path) -> Iterator[tuple[str, PromptEntry]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install pyarrow") from error
    for index, row in enumerate(parquet.read_table(path).to_pylist()):
        yield f"{path}, row {index}", row


def _read_dataset(path: Path, column: str) -> Iterator[tuple[str, PromptEntry]]:
    dataset = _datasets(f"the datasets directory {path}").load_from_disk(str(path))
    if isinstance(dataset, dict):
        raise ValueError(
            f"{path} holds the splits {sorted(dataset)}; pass one, such as {path / min(dataset)}"
        )
    yield from _rows(dataset, column, str(path))


def _datasets(what: str) -> Any:
    """
    Raises:
        ImportError: where `what` needs the package and it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{what} needs datasets: pip install 'lacfast[datasets]'") from error
    return datasets


def _rows(dataset: Any, column: str, origin: str) -> Iterator[tuple[str, PromptEntry]]:
    if column not in dataset.column_names:
        raise ValueError(
            f"{origin} has no column {column!r}; its columns are {dataset.column_names}: name the one that "
            "holds the caption with column="
        )
    for index, row in enumerate(dataset):
        yield f"{origin}, row {index}", row


@dataclass(frozen=True)
class HubDataset:
    """A data set by its name on Hugging Face's hub, or a directory in the hub's layout."""

    name: str
    split: str = "train"
    """One of the data set's, or a part of it, as "train[:1000]"."""
    column: str = "prompt"
    """What holds the caption."""
    config: str = ""
    """Which of the data set's configurations. Empty: its only or default one."""
    revision: str = ""
    """Branch, tag or commit. Empty: the newest, which may be another one tomorrow."""

    @staticmethod
    def named(words: str, column: str = "prompt") -> HubDataset:
        """The data set of "OWNER/NAME,split=test,column=Prompt".

        Raises:
            ValueError: for a setting that there is none of.
        """
        name, *settings = words.split(",")
        require(bool(name), f"{HUB}{words} names no data set; write {HUB}OWNER/NAME,split=test")
        given = {"column": column}
        known = [field.name for field in fields(HubDataset)[1:]]
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals or key not in known:
                raise unknown(f"setting of {HUB}{name}", key, known, "Write hub:OWNER/NAME,split=test")
            given[key] = value
        return HubDataset(name, **given)

    def rows(self) -> Iterator[tuple[str, PromptEntry]]:
        """(where it stands, row) of its split; downloads what the cache does not hold.

        Raises:
            ValueError: when it cannot be loaded, or has no such column.
            ImportError: when datasets is not installed.
        """
        origin = HUB + self.name
        datasets = _datasets(f"the data set {origin}")
        try:
            # Data alone: datasets runs no repository's code, from version 4 on.
            dataset = datasets.load_dataset(
                self.name, self.config or None, split=self.split, revision=self.revision or None
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ValueError(f"{origin} cannot be loaded, {reason}; check name, split and network") from error
        return _rows(dataset, self.column, origin)


def _collected(
    entries: Iterable[tuple[str, PromptEntry]], *, column: str = "prompt", origin: str = ""
) -> PromptSet:
    texts: list[str] = []
    metadata: list[dict[str, Any]] = []
    for place, entry in entries:
        text, about = _text_and_metadata(place, entry, column)
        texts.append(text)
        metadata.append(about)
    if not texts:
        raise ValueError(
            f"there is no prompt to train on{' in ' + origin if origin else ''}; pass at least one"
        )
    return PromptSet(texts, metadata)


def _text_and_metadata(place: str, entry: PromptEntry, column: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping):
        text = entry.get(column)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{place}: {column!r} is {text!r}, not a prompt; its keys are {sorted(entry)}; name the one "
                "that holds the caption with column="
            )
        return text, dict(entry)
    if hasattr(entry, "text") and hasattr(entry, "metadata"):
        return entry.text, entry.metadata
    raise ValueError(
        f"{place}: {entry!r} is no prompt; pass a string, a row with {column!r}, or text and metadata"
    )
