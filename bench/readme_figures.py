"""Writes the README's proof from docs/demo/summary.json, so that none of its numbers is typed.

python bench/readme_figures.py              from the recorded run
python bench/readme_figures.py runs/demo    record that run under docs/demo first
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
BEGIN, END = "<!-- proof:begin -->", "<!-- proof:end -->"


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


def updated(readme: str, summary: dict[str, Any]) -> str:
    """The README with the proof between its markers."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not tail:
        raise ValueError(f"README.md lacks {BEGIN} or {END}; put both where the figures belong")
    return f"{head}{BEGIN}\n{proof(summary)}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    try:
        if arguments:
            record(Path(arguments[0]))
        if not (RECORD / "summary.json").exists():
            raise ValueError("no run is recorded; pass the --out of a finished `lacfast demo`")
        summary = json.loads((RECORD / "summary.json").read_text(encoding="utf-8"))
        README.write_text(updated(README.read_text(encoding="utf-8"), summary), encoding="utf-8")
    except ValueError as error:
        print(f"readme_figures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
