"""Prompt embeddings in bounded memory, each prompt encoded once, so that the text encoders can be away.

While the encoder is set aside, embeddings come from files that all runs share. A prompt that has none brings
the encoder back for a block: it and all others without a file that are expected soon.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import islice

import torch

from lacfast.backbones.parts import Embeddings, PromptEncoder, stacked
from lacfast.backbones.prompt_files import PromptFiles
from lacfast.rewards.workers import Workers

ENCODE_BATCH = 8
"""Prompts per call of the encoder, always: a matrix product of another height may round differently, and a
resumed run must get the same embeddings as the one that encoded other prompts beside them."""
DEFAULT_CAPACITY = 4 << 30
"""Bytes; a prompt of SD3 takes 2.7 MB in bfloat16, one of FLUX 4.2 MB."""
AHEAD_SHARE = 0.5
"""Share of the capacity for prompts that are expected; a block of them is encoded at a time."""
DRAWS_AHEAD = 64
"""Most draws that are looked into at a time: few prompts may make many draws."""


class PromptCache:
    """Embeddings by prompt, in memory of the CPU; the longest unused go first when `capacity` is full."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self.encoder = encoder
        self.capacity = DEFAULT_CAPACITY
        self.entries: OrderedDict[str | None, Embeddings] = OrderedDict()
        self.files: PromptFiles | None = None
        self.is_aside = False
        """Whether the encoder is off the device, but for the blocks that it encodes."""
        self._draws: Iterator[Sequence[str]] = iter(())
        self._draw: list[str] = []
        """The next draw, or what is left of it, that is not in the window yet."""
        self._window: dict[str, Future[Embeddings | None]] = {}
        """Expected prompts that are not in `entries`, in their order: what their files hold."""
        self._reader: Workers | None = None

    @torch.no_grad()
    def fetch(self, prompts: Sequence[str]) -> Embeddings:
        """(B, ...) of the prompts."""
        found = {prompt: held for prompt in dict.fromkeys(prompts) if (held := self._held(prompt))}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing:
            found |= self._encode(missing)
        for prompt, embeddings in found.items():
            self._keep(prompt, embeddings)
        self._look_ahead()
        return stacked([found[prompt] for prompt in prompts])

    @torch.no_grad()
    def fetch_unconditional(self) -> Embeddings:
        """(1, ...) of a sample without a prompt."""
        if None not in self.entries:
            found = None if self.files is None else self.files.read(None)
            if found is None:
                encoded = self.encoder.encode_unconditional()
                found = {name: tensor[0].cpu() for name, tensor in encoded.items()}
                if self.files is not None:
                    self.files.write(None, found)
            self.entries[None] = found
        return stacked([self.entries[None]])

    def set_aside(self) -> None:
        """Take the encoder off the device; it comes back for blocks of prompts that have no file."""
        if self.is_aside:
            return
        identity = self.encoder.identity()
        self.files = None if identity is None else PromptFiles.shared(identity)
        self.fetch_unconditional()
        self.encoder.set_aside()
        self.is_aside = True

    def expect(self, draws: Iterable[Sequence[str]]) -> None:
        """Say what is fetched next, draw by draw, in place of what was said before.

        While the encoder is set aside their files are read ahead, as far as the capacity allows: whole draws,
        so that a block is encoded before a rollout is sampled and not within it.
        """
        self._draws, self._draw = islice(draws, DRAWS_AHEAD), []
        before, self._window = self._window, {}
        self._look_ahead(before)
        for read in before.values():
            read.cancel()

    @property
    def entry_bytes(self) -> int:
        """Bytes of the embeddings of one prompt; all are of one size, and one is there."""
        return sum(tensor.nbytes for tensor in next(iter(self.entries.values())).values())

    @property
    def _places(self) -> int:
        """Entries that fill the capacity."""
        return self.capacity // self.entry_bytes

    def _held(self, prompt: str) -> Embeddings | None:
        """The embeddings, where they need not be encoded."""
        read = self._window.pop(prompt, None)
        if prompt in self.entries:
            return self.entries[prompt]
        if read is not None:
            return read.result()
        return None if self.files is None else self.files.read(prompt)

    def _encode(self, missing: list[str]) -> dict[str, Embeddings]:
        """The embeddings of prompts that nobody holds; those of others that are expected are kept too."""
        if not self.is_aside:
            return self._encoded(missing, missing)
        lacking = [prompt for prompt, read in self._window.items() if read.result() is None]
        for prompt in lacking:
            del self._window[prompt]
        try:
            self.encoder.bring_back()
            return self._encoded(missing + lacking, missing, self.files)
        except torch.OutOfMemoryError:
            warnings.warn(
                f"out of memory for the text encoders beside the run: {len(missing)} prompts are encoded on "
                "the CPU. Set a smaller rollout_batch_size or batch_size to leave them room",
                RuntimeWarning,
                stacklevel=4,
            )
        finally:
            self.encoder.set_aside()
        # Not into files: the CPU rounds differently.
        return self._encoded(missing, missing)

    def _encoded(
        self, prompts: list[str], wanted: list[str], files: PromptFiles | None = None
    ) -> dict[str, Embeddings]:
        """Encode `prompts` into memory and files; returns the wanted ones."""
        found = {}
        for start in range(0, len(prompts), ENCODE_BATCH):
            part = prompts[start : start + ENCODE_BATCH]
            padded = part + part[-1:] * (ENCODE_BATCH - len(part))
            encoded = {name: tensor.cpu() for name, tensor in self.encoder.encode(padded).items()}
            for row, prompt in enumerate(part):
                made = {name: tensor[row].clone() for name, tensor in encoded.items()}
                if files is not None:
                    files.write(prompt, made)
                self._keep(prompt, made)
                if prompt in wanted:
                    found[prompt] = made
        return found

    def _look_ahead(self, before: dict[str, Future[Embeddings | None]] | None = None) -> None:
        """Read the files of what is expected, as many as have room; `before` are reads that have begun."""
        if not self.is_aside:
            return
        room = max(int(AHEAD_SHARE * self._places), 1)
        while True:
            if not self._draw:
                draw = next(self._draws, None)
                if draw is None:
                    break
                self._draw = list(dict.fromkeys(draw))
            for prompt in self._draw:
                if prompt in self.entries:
                    self.entries.move_to_end(prompt)
            wanted = [
                prompt for prompt in self._draw if prompt not in self.entries and prompt not in self._window
            ]
            if self._window and len(self._window) + len(wanted) > room:
                break
            for prompt in wanted[:room]:
                begun = None if before is None else before.pop(prompt, None)
                self._window[prompt] = self._reading(prompt) if begun is None else begun
            self._draw = wanted[room:]
        self._evict()

    def _reading(self, prompt: str) -> Future[Embeddings | None]:
        """What a prompt's file holds, read in a thread of its own."""
        if self.files is None:
            nothing: Future[Embeddings | None] = Future()
            nothing.set_result(None)
            return nothing
        if self._reader is None:
            self._reader = Workers(1, "lacfast-prompts")
            weakref.finalize(self, self._reader.close, cancel=True, wait_s=0.0)
        return self._reader.submit(partial(self.files.read, prompt))

    def _keep(self, prompt: str, embeddings: Embeddings) -> None:
        self.entries[prompt] = embeddings
        self.entries.move_to_end(prompt)
        self._evict()

    def _evict(self) -> None:
        # Those of the window are on their way.
        kept = max(self._places - len(self._window), 1)
        while len(self.entries) > kept:
            oldest = next(iter(self.entries))
            if oldest is None:
                self.entries.move_to_end(None)
            else:
                del self.entries[oldest]
