"""Procedural tasks that need no download: prompts, scenes, checkers and the recipe of their tiny pretrained models."""
