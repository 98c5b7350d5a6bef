"""The processes that train together, their sums and their rows: the only room that knows of ranks."""

from lacfast.distributed.world import ALONE, LostRankError, Share, ToldElsewhereError, World, joined

__all__ = ["ALONE", "LostRankError", "Share", "ToldElsewhereError", "World", "joined"]
