"""Procedural tasks that need no download: prompts, scenes, checkers and tiny pretrained models."""
