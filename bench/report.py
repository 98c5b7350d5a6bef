"""Writes the README's tables from recorded results, so that none of its numbers is typed.

The proof comes from docs/demo/summary.json, the comparison of critics from bench/results/critic-trunks.json.

python -m bench.report              from what is recorded
python -m bench.report runs/demo    record that run under docs/demo first
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RECORD = ROOT / "docs" / "demo"
PICTURE = "comparison.png"
CRITICS = ROOT / "bench" / "results" / "critic-trunks.json"


def record(run: Path) -> None:
    """Copy the summary and the picture of a demo run to docs/demo.

    Raises:
        ValueError: for a directory without a run, or with a shortened one.
    """
    if not (run / "summary.json").exists():
        raise ValueError(f"{run} holds no summary.json; pass the --out of a finished `lacfast demo`")
    if json.loads((run / "summary.json").read_text(encoding="utf-8"))["quick"]:
        raise ValueError(f"{run} is a --quick run, which proves nothing; run `lacfast demo` without --quick")
    RECORD.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "summary.json", RECORD / "summary.json")
    shutil.copyfile(run / "images" / PICTURE, RECORD / PICTURE)


def proof(summary: dict[str, Any]) -> str:
    """The table and the picture as Markdown."""
    steered = summary["steered"]
    variance = summary["explained_variance"]
    later = variance[len(variance) // 2 :]
    steps = len(variance)
    rows = [
        ("base model", summary["strict_before"], summary["gold_before"], steps),
        ("after PPO", summary["strict_after"], summary["gold_after"], steps),
        ("base model, steered", steered["strict"], steered["gold"], steered["forwards_per_image"]),
        (
            "after PPO, steered",
            steered["strict_after"],
            steered["gold_after"],
            steered["forwards_per_image_after"],
        ),
    ]
    lines = ["| | obeys the prompt | second checker | forwards per image |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {100 * strict:.1f} % | {100 * gold:.1f} % | {forwards:g} |"
        for name, strict, gold, forwards in rows
    ]
    seconds, versions = summary["seconds"], summary["versions"]
    explained = 100 * sum(later) / len(later)
    note = (
        f"n = {summary['evaluation_samples']} images of held-out prompts per row; "
        f"{seconds['training']:.0f} s of PPO in a demo of {seconds['total']:.0f} s on the CPU, "
        f"{summary['images']:,} images in all; the critic explains {explained:.0f} % of the reward's "
        "variance in the second half of the steps "
        f"({summary['backbone']}, seed {summary['seed']}, torch {versions['torch']})."
    )
    picture = f"![The same prompts before and after, plain and steered](docs/demo/{PICTURE})"
    lines += ["", picture, "", note]
    return "\n".join(lines)


def critics(result: dict[str, Any]) -> str:
    """What each critic trunk explains and costs, as Markdown."""
    lines = [
        "| `trunk` | own parameters | explained variance, second half | time per training iteration |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {row['parameters'] / 1e3:.0f} k | {row['explained_variance_second_half']:.2f} "
        f"| {row['iteration_time_over_shared']:.2f} |"
        for name, row in result["trunks"].items()
    ]
    images = next(iter(result["trunks"].values()))["images"]
    note = (
        f"Held-out states of the demo's {result['backbone']} ({result['actor_parameters'] / 1e3:.0f} k "
        f"parameters) after value pretraining on the same {images:,} images; time relative to `shared`, "
        f"in turn, median of {result['timed_rounds']}; one seed. `python -m bench.critic_trunks` measures it."
    )
    return "\n".join([*lines, "", note])


def updated(readme: str, block: str, text: str) -> str:
    """The README with `text` between the markers of `block`."""
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    head, _, rest = readme.partition(begin)
    _, _, tail = rest.partition(end)
    if not tail:
        raise ValueError(f"README.md lacks {begin} or {end}; put both where the figures belong")
    return f"{head}{begin}\n{text}\n{end}{tail}"


def blocks() -> dict[str, str]:
    """Marker -> Markdown, of everything that is recorded."""
    sources = {"proof": (RECORD / "summary.json", proof), "critics": (CRITICS, critics)}
    return {
        block: write(json.loads(path.read_text(encoding="utf-8")))
        for block, (path, write) in sources.items()
        if path.exists()
    }


def main(arguments: list[str]) -> int:
    try:
        if arguments:
            record(Path(arguments[0]))
        readme = README.read_text(encoding="utf-8")
        for block, text in blocks().items():
            readme = updated(readme, block, text)
        README.write_text(readme, encoding="utf-8")
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
