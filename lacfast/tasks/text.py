"""The text encoder of the embedded tasks: embeddings, learnt in pretraining and frozen afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lacfast.tasks import scenes
from lacfast.tasks.folders import read_folder, write_folder
from lacfast.tasks.task import Task
from lacfast.transfer import to_device

WIDTH = 96
PADDING = 0


class WordEncoder(nn.Module):
    """Prompts to tokens (B, L, D) and a pooled embedding (B, D).

        token_l = word_l + position_l;   pooled = sum_l word_l * position_l / sqrt(words of the prompt)

    Past its end a prompt holds a padding word, which the pooled sum leaves out. The product binds a word to
    its place: "a red circle left of a blue square" and its mirror image have the same mean of tokens.
    """

    def __init__(self, *, words: Sequence[str], length: int, width: int = WIDTH) -> None:
        super().__init__()
        self.words = tuple(words)
        self.length = length
        self.width = width
        self._index = {word: index + 1 for index, word in enumerate(self.words)}
        self.word = nn.Embedding(len(self.words) + 1, width)
        self.position = nn.Embedding(length, width)

    @classmethod
    def from_pretrained(cls, directory: Path) -> WordEncoder:
        """What `save_pretrained` wrote, in eval mode and without gradient.

        Raises:
            ValueError: the directory holds no encoder.
        """
        config, weights = read_folder(directory)
        # The embeddings are drawn before they are loaded; the caller's random state stays as it was.
        with torch.random.fork_rng(devices=[]):
            encoder = cls(**config)
        encoder.load_state_dict(weights)
        return encoder.eval().requires_grad_(False)

    def save_pretrained(self, directory: Path) -> None:
        """Writes what `from_pretrained` reads."""
        config = {"words": list(self.words), "length": self.length, "width": self.width}
        write_folder(self, config, directory)

    def indices(self, prompts: Sequence[str]) -> Tensor:
        """Word numbers (B, L) int64, PADDING past the end of a prompt."""
        rows = [self._prompt_indices(prompt) for prompt in prompts]
        numbers = torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length)
        return to_device(numbers, self.word.weight.device)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tokens (B, L, D) and pooled embeddings (B, D) of B prompts, by SD3's names.

        Raises:
            ValueError: a word is unknown, or a prompt has more than L words.
        """
        tokens, pooled = self.embed(self.indices(prompts))
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def encode_unconditional(self) -> dict[str, Tensor]:
        """(1, ...) of no words, for classifier-free guidance."""
        return self.encode([""])

    def identity(self) -> None:
        """No file is worth while: the embeddings are small."""

    def set_aside(self) -> None:
        """Nothing: the embeddings are small."""

    def bring_back(self) -> None:
        """Nothing was set aside."""

    def embed(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) and pooled embeddings (B, D) of word numbers (B, L)."""
        words = self.word(indices)
        present = (indices != PADDING).unsqueeze(-1).to(words.dtype)
        pooled = (words * self.position.weight * present).sum(1) / present.sum(1).clamp(min=1).sqrt()
        return words + self.position.weight, pooled

    def _prompt_indices(self, prompt: str) -> list[int]:
        words = prompt.lower().split()
        for word in words:
            if word not in self._index:
                known = ", ".join(self.words)
                raise ValueError(f"unknown word {word!r} in prompt {prompt!r}; known words: {known}")
        if len(words) > self.length:
            raise ValueError(f"prompt {prompt!r} has {len(words)} words; at most {self.length} are allowed")
        return [self._index[word] for word in words] + [PADDING] * (self.length - len(words))


def word_encoder(task: Task = scenes.TASK, *, generator: torch.Generator) -> WordEncoder:
    """An untrained encoder of a task's vocabulary, standard normal embeddings drawn from `generator`."""
    prompts = [prompt.text.split() for prompt in task.prompts()]
    words, length = sorted({word for prompt in prompts for word in prompt}), max(map(len, prompts))
    with torch.random.fork_rng(devices=[]):
        encoder = WordEncoder(words=words, length=length)
    with torch.no_grad():
        encoder.word.weight.normal_(generator=generator)
        encoder.position.weight.normal_(generator=generator)
    return encoder
