"""Prompts of single animals, the kind of prompt that DDPO (arXiv 2305.13301) starts with."""

from __future__ import annotations

ANIMALS = (
    "ant", "antelope", "bat", "bear", "beaver", "bee", "bison", "butterfly", "camel", "cat", "chicken", "cow",
    "crab", "crow", "deer", "dog", "dolphin", "donkey", "duck", "eagle", "elephant", "fox", "frog", "giraffe",
    "goat", "goose", "hedgehog", "horse", "kangaroo", "koala", "lion", "lizard", "monkey", "mouse", "octopus",
    "otter", "owl", "panda", "parrot", "penguin", "pig", "rabbit", "seal", "sheep", "snake", "squirrel",
    "tiger", "turtle", "wolf", "zebra",
)  # fmt: skip


def animal_prompts() -> list[str]:
    """One prompt per animal."""
    return [f"a photo of {'an' if animal[0] in 'aeiou' else 'a'} {animal}" for animal in ANIMALS]
