"""Options as files of earlier versions spell them, in today's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Settings = dict[str, Any]


def today(kind: str, stored: Settings) -> Settings:
    """The settings of a dataclass by its name, with what an earlier version wrote in today's words.

    An option that is gone is left out where it had its default, which says nothing.
    """
    gone = _GONE.get(kind, {})
    kept = {name: value for name, value in stored.items() if name not in gone or value != gone[name]}
    return _SPELLINGS.get(kind, dict)(kept)


def _ppo(stored: Settings) -> Settings:
    """Three options of which exactly one was set are `clip`; three that a weight turned on are `kl`."""
    choices = {"clip_range": "ratio", "clip_nats": "nats", "kl_threshold": "kl_mask"}
    kept = {name: value for name, value in stored.items() if name not in (*choices, "kl_weight", "kl_target")}
    # A kind alone; a choice's word has its weight.
    if "kl_weight" in stored or stored.get("kl") in ("exact", "velocity", "flow_grpo"):
        kept["kl"] = None
        if stored.get("kl_weight"):
            kept["kl"] = {"choice": "penalty", "weight": stored["kl_weight"]}
            kept["kl"] |= {"kind": stored.get("kl", "exact"), "target": stored.get("kl_target")}
    for name, choice in choices.items():
        if stored.get(name) is not None:
            kept["clip"] = {"choice": choice, name: stored[name]}
    return kept


def _sampler(stored: Settings) -> Settings:
    """A pair, and four options that only a moving window had, are `window`."""
    moving = ("window_schedule", "window_size", "window_stride", "window_interval")
    kept = {name: value for name, value in stored.items() if name not in moving}
    schedule, within = stored.get("window_schedule", "fixed"), stored.get("window")
    if schedule == "fixed":
        if isinstance(within, list | tuple):
            kept["window"] = {"choice": "fixed", "steps": within}
        return kept
    kept["window"] = {"choice": schedule, "size": stored.get("window_size"), "within": within}
    if schedule == "sliding":
        kept["window"] |= {
            "every": stored.get("window_interval", 1), "stride": stored.get("window_stride", 1)
        }  # fmt: skip
    return kept


def _advantages(stored: Settings) -> Settings:
    """The estimator's own options are inside it, as it alone read them."""
    names = {"group_std": "std", "buffer_size": "buffer_size", "min_count": "min_count"}
    kept = {name: value for name, value in stored.items() if name not in names}
    if isinstance(stored.get("estimator"), str):
        read = {"grpo": ("group_std",), "leave_one_out": ("group_std",), "ddpo": ("buffer_size", "min_count")}
        own = {names[name]: stored[name] for name in read.get(stored["estimator"], ()) if name in stored}
        # Without any it is a choice's word.
        kept["estimator"] = {"choice": stored["estimator"], **own} if own else stored["estimator"]
    return kept


def _run(stored: Settings) -> Settings:
    """The resolution was the one setting of a pipeline that a run had."""
    kept = {name: value for name, value in stored.items() if name != "resolution"}
    return kept | ({"pipeline": {"resolution": stored["resolution"]}} if "resolution" in stored else {})


_SPELLINGS: dict[str, Callable[[Settings], Settings]] = {
    "AdvantageConfig": _advantages,
    "PPOConfig": _ppo,
    "RunConfig": _run,
    "SamplerConfig": _sampler,
}
"""Dataclass -> what makes today's settings of its earlier ones."""
_GONE: dict[str, Settings] = {
    "EarlyStoppingConfig": {"min_improvement": 0.0},
    "GraphConfig": {"launch_bound": 0.7, "max_steps": 0, "unroll": 1},
    "PPOConfig": {"gamma": 1.0, "reuse_uncond": True},
    "ValuePretrainingConfig": {"bound_steps": None, "initial_rate_factor": 3.0},
}
"""Dataclass -> option that is gone -> its default."""
