"""Where the sample ids of each kind of rollout begin, so that no two share noise.

Noise is a function of (seed, sample id). Training counts its ids from 0.
"""

from __future__ import annotations

EVALUATION = 1 << 40
"""The same noise for every evaluation."""
VALUE_PRETRAINING = 1 << 41
SELECTION = 1 << 42
"""Of the held-out rollout that measures value pretraining and chooses its critic."""
COMPLETIONS = 1 << 43
"""Of the branched completions that measure what a state tells of its reward."""
