"""The README's four figures: what a reader asks first, answered by what was recorded, undecided or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.learning import tables
from bench.learning.claims import CLAIMS
from bench.learning.page import OTHERS, RIVALS
from lacfast.tasks.models import BackboneName


def table(learning: Path, iterations: dict[str, Any], costs: dict[str, Any]) -> str:
    """One row per question, as Markdown.

    Args:
        learning: the folder of learning curves.
        iterations: the record of `python -m bench.iteration`.
        costs: the record of `python -m bench.costs`.
    """
    checker, learnt, words = (
        _leads(learning, name, "dit", RIVALS["critic-weighted NFT"], OTHERS)
        for name in ("objectives", "proxy-nft", "glyphs-proxy-nft")
    )
    backbones: tuple[BackboneName, ...] = ("dit", "unet")
    read, unet_read = (
        _leads(learning, "glyphs-nft", each, RIVALS["critic-weighted NFT"]) for each in backbones
    )
    unet = _leads(learning, "slow", "unet", ("DiffusionNFT",))
    rows = [
        (
            "Does it learn more? Accuracy at equal images, critic-weighted NFT minus others, tiny models",
            f"shapes: {checker}; words: {read}; words on the UNet: {unet_read}",
        ),
        (
            "With a learnt reward too, judged by a checker that does not train?",
            f"shapes: {learnt}; words: {words}; shapes on the UNet: {unet}",
        ),
        (
            "Is it faster? An iteration of equal maths over a peer's loop at its fastest batch",
            _iteration(iterations),
        ),
        ("What does the critic cost? FLOPs of values, of those of sampling with SD3.5-M", _values(costs)),
    ]
    lines = ["| | measured without a GPU |", "|---|---|"]
    return "\n".join(lines + [f"| {question} | {answer} |" for question, answer in rows])


def _leads(
    learning: Path, name: str, backbone: BackboneName, peers: Sequence[str], rivals: Sequence[str] = ()
) -> str:
    """By how much the first arm leads each of `peers` at the end, over how many seeds; runs of `rivals` may
    be another claim's."""
    found = tables.at_best(learning, CLAIMS, name, backbone, rivals)
    first = next(iter(found))
    curves = {arm: runs for arm, runs in found.items() if arm in (first, *peers)}
    leads = (
        f"{peer.rpartition(' minus ')[2]} {at_end}"
        for _, peer, at_end, *_ in tables.leads(curves, CLAIMS[name])
    )
    return f"{', '.join(leads)} ({len(curves[first])} paired seeds)"


def _iteration(record: dict[str, Any]) -> str:
    """Times as fast as each peer, as the modules are and with compiled blocks."""
    parts = []
    for contest in record["contests"]:
        own = {
            row["contender"]: row["over_tuned"]
            for row in record["rows"]
            if row["phase"] == "iteration" and contest["model"].endswith(row["model"])
        }
        peer = {"ddpo": "ddpo-pytorch"}.get(contest["peer"], contest["peer"])
        speeds = f"{own['lacfast']:.2f}x, compiled {own['lacfast, compiled']:.2f}x"
        parts.append(f"{speeds} ({peer}, {contest['model']})")
    return "; ".join(parts)


def _values(record: dict[str, Any]) -> str:
    flops = record["sd35_medium"]["flops_per_image"]
    heads, branch = (100 * flops["values"][trunk] / flops["sampling"] for trunk in ("shared", "branch"))
    return f"+{heads:.2g} % by heads; +{branch:.2g} % by a branch"
