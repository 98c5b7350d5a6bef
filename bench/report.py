"""Writes the tables of README and docs from recorded results, so that none of their numbers is typed.

A table stands between its markers, `<!-- NAME:begin -->` and `<!-- NAME:end -->`, in one of PAGES.

The proof and the demo's tables come from docs/demo/summaries.json, the kernels from the newest
bench/results/kernels-{cpu,intel-avx2,avx512,avx2}-*.json (`python -m bench.kernels`), what a machine allows
them from bench/results/roofline-*.json (`python -m bench.roofline`), what a second thread brings them from
bench/results/threads-*.json (`python -m bench.threads`), iterations from the newest
bench/results/iteration-cpu-*.json (`python -m bench.iteration`), what the published models cost from
bench/results/costs.json (`python -m bench.costs`), the host's work from bench/results/host-work-*.json
(`python -m bench.host_work`), what the recipes hold in memory from bench/results/memory.json
(`python -m bench.memory`) and what a run of them then allocates from bench/results/allocations.json
(`python -m bench.allocations`), what the GPU kernels issue from bench/results/kernel-counts.json
(`python -m bench.kernel_counts`), what an OCR engine reads before and after PPO from bench/results/ocr.json
(`python -m bench.ocr`), what several processes make of an iteration from bench/results/scaling.json
(`python -m bench.scaling`), the README's figures from iterations, costs and bench/results/learning. Methods
are in docs/results.md, which `python -m bench.learning` writes.

python -m bench.report               from what is recorded
python -m bench.report runs/demos    record the runs of `python -m bench.demo` under docs/demo first
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from bench import allocations, headline, host_work, kernel_counts, memory, ocr, roofline, scaling, threads
from bench import costs as published_costs
from bench.shapes import CASES, CLAIM_ADVANTAGE, CLAIM_LATENT, CLAIM_POOL
from bench.workloads.libraries import TORCHRL_LOOP, TORCHRL_VECTORIZED
from bench.workloads.workload import OURS, OURS_DRAWN
from lacfast.report.demo import levels, score_rows
from lacfast.runtime.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "demo"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "results.md",
    RECORD / "README.md",
    ROOT / "docs" / "ocr.md",
    ROOT / "docs" / "distributed.md",
)
"""Where markers may stand, each table's in exactly one of them."""
DEMOS = RECORD / "summaries.json"
"""What runs of the demo came to, the pictured one first."""
PICTURE = "comparison.png"
RESULTS = ROOT / "bench" / "results"
COSTS = RESULTS / "costs.json"
LEARNING = RESULTS / "learning"


def record(runs: Path) -> None:
    """Keep the summaries of demo runs, and the picture of the first, in docs/demo.

    Raises:
        ValueError: for a directory without runs, or with a shortened one.
    """
    paths = sorted(runs.glob("seed-*/summary.json"))
    if not paths:
        raise ValueError(f"{runs} holds no seed-*/summary.json; pass the folder of `python -m bench.demo`")
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for path, summary in zip(paths, summaries, strict=True):
        if summary["quick"]:
            raise ValueError(
                f"{path.parent} is a --quick run, which proves nothing; use `python -m bench.demo`, which "
                "shortens none"
            )
    RECORD.mkdir(parents=True, exist_ok=True)
    write_json(DEMOS, summaries)
    shutil.copyfile(paths[0].parent / "images" / PICTURE, RECORD / PICTURE)


def demo(summaries: list[dict[str, Any]]) -> str:
    """What both checkers say of the demo whose picture is recorded, as Markdown."""
    summary = summaries[0]
    lines = [
        "| | obeys the prompt | second checker | ground off by, of 255 | forwards per image |",
        "|---|---|---|---|---|",
    ]
    for model, strict, gold, _, ground, forwards in score_rows(summary):
        name = model.replace("before", "base model").replace("after", "after training")
        lines.append(f"| {name} | {strict} | {gold} | {ground} | {forwards} |")
    variance = summary["explained_variance"]
    later = variance[len(variance) // 2 :]
    seconds, versions = summary["seconds"], summary["versions"]
    note = (
        f"{summary['evaluation_samples']:,} images of held-out prompts per row; {seconds['training']:.0f} s "
        f"of training in a demo of {seconds['total']:.0f} s on {summary['processes']} cores, "
        f"{summary['images']:,} images in all; "
        f"the critic explains {100 * sum(later) / len(later):.0f} % of the reward's variance in the second "
        f"half of the steps ({summary['backbone']}, seed {summary['seed']}, torch {versions['torch']})."
    )
    return "\n".join([*lines, "", note])


def demo_seeds(summaries: list[dict[str, Any]]) -> str:
    """What the demo comes to with every recorded seed, as Markdown."""
    columns = ("seed", "base model", "after training", "and steered", "second checker, after training")
    columns += ("ground off by, of 255", "typical latent moved by", "training", "seconds in all")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for summary in summaries:
        shares = (summary["strict_before"], summary["strict_after"], summary["steered"]["strict_after"])
        shares += (summary["gold_after"],)
        ground = (levels(summary[f"background_{when}"]) for when in ("before", "after"))
        lines.append(
            f"| {summary['seed']} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} "
            f"| {' before, '.join(ground)} after | {summary['latent_drift']:.3f} "
            f"| {summary['iterations']} iterations | {summary['seconds']['total']:.0f} |"
        )
    return "\n".join(lines)


def proof(summaries: list[dict[str, Any]]) -> str:
    """The recorded demo's picture, and what it shows in a sentence, as Markdown."""
    summary = summaries[0]
    before, after = 100 * summary["strict_before"], 100 * summary["strict_after"]
    note = (
        f"Held-out prompts are obeyed by {before:.1f} % of {summary['evaluation_samples']:,} images before, "
        f"by {after:.1f} % after {summary['seconds']['training']:.0f} s of training on "
        f"{summary['processes']} cores, and by "
        f"{100 * summary['steered']['strict_after']:.1f} % when the critic then steers."
    )
    return f"![The same prompts before and after, plain and steered](docs/demo/{PICTURE})\n\n{note}"


def kernels(result: dict[str, Any]) -> str:
    """Ours beside each op's baseline at the claim's sizes, float32 and bfloat16, as Markdown."""
    claims = {str(cases[1]) for cases in CASES.values()}
    rows = [row for row in result["rows"] if row["case"] in claims and "microseconds" in row]
    cells = {(row["op"], row["dtype"], row["provider"]): row for row in rows}
    lines = [
        "| op | float32: baseline | lacfast | bfloat16: baseline | lacfast | % of copy bandwidth |",
        "|---|---|---|---|---|---|",
    ]
    for op in dict.fromkeys(row["op"] for row in rows):
        for provider in (OURS, OURS_DRAWN):
            own = [cells.get((op, dtype, provider)) for dtype in ("float32", "bfloat16")]
            if not any(own):
                continue
            name = f"`{op}`".replace(", guided`", "`, guided") + provider.removeprefix(OURS)
            shown = [_beside_baseline(row, cells) for row in own]
            share = ", ".join(f"{row['percent_of_copy']:.0f}" for row in own if row)
            lines.append(f"| {name} | {' | '.join(shown)} | {share} |")
    machine, processor = result["machine"], result["machine"]["processor"]
    note = (
        f"Milliseconds (and speed-up) of one thread on {machine['label']}, torch "
        f"{machine['versions']['torch']} with {processor['instruction set (torch)']}, lacfast with "
        f"{processor['instruction set (lacfast)']}, {result['date']}: medians of interleaved rounds after "
        "equal results; losing cases included. "
        f"Latents are {CLAIM_LATENT}; features {CLAIM_POOL}; advantages {CLAIM_ADVANTAGE}. `step_log_prob` "
        "and `ppo_loss` are forward and backward. Baseline: torch.compile of the peers' formula, which is "
        "given its noise; in the rows `noise drawn` torch.randn and that formula, as a peer's step runs, but "
        "for `ppo_loss`, whose peers read stored latents instead; for `gae` their Python loop, for "
        "`systematic_resample` the eager reference, for `normal_noise` torch.compile of the reference. A "
        f"copy beyond the cache moves {result['copy_gigabytes_per_second']:.1f} GB/s; smaller data may pass "
        f"it.{_beside_torchrl(cells)} `python -m bench.kernels` measures it."
    )
    return "\n".join([*lines, "", note])


def _beside_torchrl(cells: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """How many times as fast as torchrl's two forms `gae` is; empty where they were not installed."""
    own, loop, vectorized = (
        cells.get(("gae", "float32", name)) for name in (OURS, TORCHRL_LOOP, TORCHRL_VECTORIZED)
    )
    if own is None or loop is None or vectorized is None:
        return ""
    ratios = [row["microseconds"] / own["microseconds"] for row in (loop, vectorized)]
    return (
        f" torchrl's loop takes {ratios[0]:.1f} times as long as `gae`, its vectorised form {ratios[1]:.0f}."
    )


def _beside_baseline(row: dict[str, Any] | None, cells: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """Two cells: the baseline's time, and the own with its speed-up; empty where nothing was measured."""
    if row is None:
        return " | "
    baseline = cells[row["op"], row["dtype"], row["baseline"]]
    return f"{baseline['microseconds'] / 1e3:.2f} | {row['microseconds'] / 1e3:.2f} ({row['speed_up']:.1f}x)"


PHASES = {"sampling": "sampling", "reference": "anchor", "update": "update", "iteration": "iteration"}
"""A phase in the records -> its column."""
PEERS = {"flow_grpo": "flow_grpo", "ddpo": "ddpo-pytorch"}


def iterations(record: dict[str, Any]) -> str:
    """How many times as fast as a peer's loop every phase is, as Markdown."""
    lines = [f"| | peer's batches | {' | '.join(PHASES.values())} |", "|---|---|---|---|---|---|"]
    for contest in record["contests"]:
        rows = [row for row in record["rows"] if contest["model"].endswith(row["model"])]
        batches = f"{contest['published_batch']}, {contest['tuned_batch']}"
        for name in (name for name in dict.fromkeys(row["contender"] for row in rows) if "peer" not in name):
            own = {row["phase"]: row for row in rows if row["contender"] == name}
            cells = [
                f"{own[phase]['over_published']:.2f}x, {own[phase]['over_tuned']:.2f}x"
                if phase in own
                else ""
                for phase in PHASES
            ]
            label = f"{contest['model']} against {PEERS[contest['peer']]}: {name}"
            lines.append(f"| {label} | {batches} | {' | '.join(cells)} |")
    largest = max(value for contest in record["contests"] for value in contest["differences"].values())
    first = record["contests"][0]
    note = (
        "Times as fast as the peer's loop at its published batch, and at the batch of its own that is "
        f"fastest here. One thread on {record['machine']['label']}, "
        f"torch {record['machine']['versions']['torch']}, {record['date']}: "
        f"medians of {record['rounds']} interleaved rounds of {first['num_steps']} steps "
        f"and {first['num_updates']} optimizer steps. Trajectories and float64 gradients of both sides "
        f"differ by at most {largest:.0e}; no side has a critic, and the reward costs nothing. "
        "`python -m bench.iteration` measures it."
    )
    return "\n".join([*lines, "", note])


def newest(pattern: str) -> Path:
    """The last of the dated results, or a path that does not exist."""
    return max(RESULTS.glob(pattern), default=RESULTS / pattern)


def markers(block: str) -> tuple[str, str]:
    """What stands before and after a table."""
    return f"<!-- {block}:begin -->", f"<!-- {block}:end -->"


def updated(page: str, block: str, text: str) -> str:
    """The page with `text` between the markers of `block`."""
    begin, end = markers(block)
    head, _, rest = page.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"{begin} is not followed by {end}; put both where the table belongs")
    return f"{head}{begin}\n{text}\n{end}{tail}"


def pages(tables: dict[str, str], homes: dict[Path, str]) -> dict[Path, str]:
    """The pages with every table in its home.

    Args:
        tables: marker -> Markdown whose links start at the root.
        homes: path -> text of the pages that may have markers.

    Raises:
        ValueError: a table has no home, or several.
    """
    written = dict(homes)
    for block, text in tables.items():
        having = [path for path, page in homes.items() if markers(block)[0] in page]
        if len(having) != 1:
            names = ", ".join(path.name for path in homes)
            raise ValueError(
                f"{markers(block)[0]} stands in {len(having)} of {names}; put it into one of them"
            )
        (home,) = having
        relative = text.replace("](docs/", "](") if home.parent.name == "docs" else text
        written[home] = updated(written[home], block, relative)
    return written


def blocks() -> dict[str, str]:
    """Marker -> Markdown, of everything that is recorded."""
    sources = {
        "proof": (DEMOS, proof),
        "demo": (DEMOS, demo),
        "demo-seeds": (DEMOS, demo_seeds),
        "kernels": (newest("kernels-cpu-*.json"), kernels),
        "kernels-intel-avx2": (newest("kernels-intel-avx2-*.json"), kernels),
        "kernels-avx512": (newest("kernels-avx512-*.json"), kernels),
        "kernels-avx2": (newest("kernels-avx2-*.json"), kernels),
        "iteration": (newest("iteration-cpu-*.json"), iterations),
        "costs": (COSTS, published_costs.table),
        "memory": (memory.RESULT, memory.table),
        "allocations": (allocations.RESULT, allocations.table),
        "ocr": (ocr.RESULT, ocr.table),
        "kernel-counts": (kernel_counts.RESULT, kernel_counts.table),
        "ranks-on-paper": (scaling.RESULT, scaling.paper_table),
        "ranks-strong": (scaling.RESULT, scaling.strong_text),
        "ranks-apart": (scaling.RESULT, scaling.apart_text),
    }
    by_machine = {"roofline": roofline.table, "threads": threads.table, "host-work": host_work.table}
    for stem, table in by_machine.items():
        sources |= {path.stem: (path, table) for path in RESULTS.glob(f"{stem}-*.json")}
    read = {
        block: json.loads(path.read_text(encoding="utf-8"))
        for block, (path, _) in sources.items()
        if path.exists()
    }
    found = {block: sources[block][1](record) for block, record in read.items()}
    if read.keys() >= {"iteration", "costs"} and LEARNING.exists():
        found["figures"] = headline.table(LEARNING, read["iteration"], read["costs"])
    return found


def main(arguments: list[str]) -> int:
    try:
        if arguments:
            record(Path(arguments[0]))
        homes = {path: path.read_text(encoding="utf-8") for path in PAGES}
        for path, text in pages(blocks(), homes).items():
            path.write_text(text, encoding="utf-8")
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
