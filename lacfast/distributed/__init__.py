"""The processes that train together, their sums and their rows: the only room that knows of ranks."""

from lacfast.distributed.bridge import Bridge, require_learners
from lacfast.distributed.sharding import Sharding
from lacfast.distributed.share import Share
from lacfast.distributed.world import ALONE, LostRankError, ToldElsewhereError, World, joined

__all__ = [
    "ALONE",
    "Bridge",
    "LostRankError",
    "Sharding",
    "Share",
    "ToldElsewhereError",
    "World",
    "joined",
    "require_learners",
]
