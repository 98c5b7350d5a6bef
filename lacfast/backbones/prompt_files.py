"""Prompt embeddings on disk, shared by all runs: a file per prompt and encoder, which appears whole."""

from __future__ import annotations

import hashlib
import os
import secrets
import warnings
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from lacfast.backbones.fingerprint import bytes_of
from lacfast.backbones.parts import Embeddings


class PromptFiles:
    """The embeddings that one encoder makes, by prompt; None is the unconditional one.

    Any number of processes may read and write at a time: a file takes its place by a rename, and whoever
    writes it writes the same. One that is not what was written is never used.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        """
        Args:
            directory: of this encoder alone.
            identity: of the encoder, see PromptEncoder.
        """
        self.directory = directory
        self.identity = identity
        self.is_writable = True

    @staticmethod
    def shared(identity: str) -> PromptFiles | None:
        """The files in Hugging Face's cache of assets; None, with a warning, where there is no writing."""
        try:
            return PromptFiles(cached_assets_path("lacfast", "prompts", identity), identity)
        except (OSError, ValueError) as error:
            warnings.warn(f"{_UNKEPT.format(error)}", RuntimeWarning, stacklevel=2)
            return None

    def read(self, prompt: str | None) -> Embeddings | None:
        """The embeddings of one prompt; None where there are none or, with a warning, the file is damaged."""
        path = self.path(prompt)
        try:
            # Not mapped: what was checked must not change with the file.
            stored = load(path.read_bytes())
            checksum = stored.pop(_CHECKSUM)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            fault = f"cannot be read ({error})"
        else:
            if torch.equal(checksum, self._checksum(prompt, stored)):
                return stored
            fault = "is not what was written"
        warnings.warn(
            f"{path} {fault}: its prompt is encoded again, and the file replaced",
            RuntimeWarning,
            stacklevel=2,
        )
        return None

    def write(self, prompt: str | None, embeddings: Embeddings) -> None:
        """Keep embeddings. Where that fails, there is one warning and no other try."""
        if not self.is_writable:
            return
        path = self.path(prompt)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        stored = embeddings | {_CHECKSUM: self._checksum(prompt, embeddings)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(stored, partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            self.is_writable = False
            warnings.warn(_UNKEPT.format(error), RuntimeWarning, stacklevel=2)

    def path(self, prompt: str | None) -> Path:
        """Where the embeddings of a prompt are kept; no folder gets too many of them."""
        name = _digest(self.identity, prompt).hexdigest()
        return self.directory / name[:2] / f"{name}.safetensors"

    def _checksum(self, prompt: str | None, embeddings: Embeddings) -> Tensor:
        """(16,) uint8 of the values, and of whose they are."""
        digest = _digest(self.identity, prompt)
        for name, tensor in sorted(embeddings.items()):
            digest.update(f"{name} {tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor))
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


_CHECKSUM = "checksum"
"""A tensor beside the embeddings."""

_UNKEPT = (
    "embeddings of prompts are not kept on disk: {}. They are encoded again when they are needed again; free "
    "some space, or set HF_ASSETS_CACHE to a directory that you may write to"
)


def _digest(identity: str, prompt: str | None) -> hashlib.blake2b:
    # No text is like the unconditional prompt's mark, whatever it holds.
    marked = "unconditional" if prompt is None else f"prompt {prompt}"
    return hashlib.blake2b(f"{identity} {marked}".encode(), digest_size=16)
