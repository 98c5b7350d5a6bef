"""The recorded OCR run: what RapidOCR reads of held-out words before and after PPO, and what a reading costs.

lacfast train words --out runs/words    the run, on one core
python -m bench.ocr runs/words          records it: bench/results/ocr.json, docs/ocr/*.png
python -m bench.report                  writes the table of docs/ocr.md
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench import machine
from lacfast.backbones import adapt_pretrained
from lacfast.config import from_json
from lacfast.records import Evaluation
from lacfast.report.pictures import Gallery, comparison
from lacfast.report.records import phase, read_metrics
from lacfast.rewards.ocr import normalized
from lacfast.runs.config import RunConfig
from lacfast.runs.directory import RunDirectory
from lacfast.tasks import words
from lacfast.tasks.storage import load_pretrained
from lacfast.trainer import LatentActorCriticTrainer

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "ocr.json"
PICTURES = ROOT / "docs" / "ocr"
SCORES = {
    "words_ocr_strict": "the engine reads the word",
    "words_ocr": "letters that the engine reads",
    "words_gold": "templates read the word",
}
"""The scores of the run, and what they are called on the page."""
SHOWN = 12
STRIDE = 5
"""Every fifth held-out prompt is pictured: chosen by position, not by outcome."""


def record(run: Path, result: Path = RESULT, pictures: Path = PICTURES) -> None:
    """Measure the models of a run of `lacfast train words` and write JSON and pictures.

    A run that was stopped is measured as far as it came.

    Raises:
        ValueError: for a directory without a run.
    """
    if not (run / "metrics.jsonl").exists():
        raise ValueError(f"{run} holds no metrics.jsonl; pass the --out of `lacfast train words`")
    torch.set_num_threads(1)
    config = from_json(RunConfig, json.loads((run / "run.json").read_text(encoding="utf-8")))
    trainer = LatentActorCriticTrainer(
        adapt_pretrained(load_pretrained(run / "base")),
        dict(config.rewards),
        words.TASK.split()[0],
        config.train,
        held_out=words.TASK.split()[1],
        evaluation_rewards=list(config.evaluation_rewards),
    )
    before = trainer.evaluate()
    trainer.load(RunDirectory(run, keep_last=config.keep_last).checkpoints()[-1])
    after = trainer.evaluate()
    lines = read_metrics(run / "metrics.jsonl")
    curve = [
        {
            "images": line["iteration"] * config.train.batch_size,
            **{name: line[name] for name in SCORES},
        }
        for line in phase(lines, "evaluate")
    ]
    if curve[-1]["images"] < trainer.images:
        curve.append({"images": trainer.images, **after.means()})
    found = {
        "date": machine.today(),
        "machine": machine.describe(torch.device("cpu")),
        "engine": engine(),
        "samples": len(before.prompts),
        "images": trainer.images,
        "iterations": trainer.iteration,
        "planned": config.train.iterations,
        "curve": curve,
        "training": [line["reward/words_ocr"] for line in phase(lines, "train")],
        "before": before.means(),
        "after": after.means(),
    }
    result.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    pictures.mkdir(parents=True, exist_ok=True)
    comparison(gallery(before, after)).savefig(pictures / "words.png", metadata={"Software": ""})
    drawn(found, config.train.batch_size).savefig(pictures / "curve.png", metadata={"Software": ""})


def engine() -> dict[str, Any]:
    """The engine's version, milliseconds per image on one thread, and share of the task's own pictures."""
    prompts = words.all_prompts()
    images = torch.from_numpy(words.draw(prompts, np.random.default_rng(0)))
    reader = words.WordsOCR()
    reader.read(images[:8])
    start = time.process_time()
    seen = reader.read(images)
    seconds = time.process_time() - start
    right = [normalized(text) == prompt.metadata["text"] for text, prompt in zip(seen, prompts, strict=True)]
    return {
        "name": "rapidocr",
        "version": version("rapidocr"),
        "milliseconds": 1e3 * seconds / len(images),
        "reads": sum(right) / len(right),
    }


def gallery(before: Evaluation, after: Evaluation) -> Gallery:
    """The same prompts and noise from both models, with what the engine reads of each."""
    reader = words.WordsOCR()
    rows = range(0, SHOWN * STRIDE, STRIDE)
    titles = list(before.prompts)
    for row in rows:
        texts = reader.read(torch.stack([before.images[row], after.images[row]]))
        titles[row] = f"{before.prompts[row]}: " + " -> ".join(_printed(text) for text in texts)
    strict = "words_ocr_strict"
    return Gallery(
        titles,
        columns={
            "before": (before.images, before.rewards[strict]),
            "after": (after.images, after.rewards[strict]),
        },
        stride=STRIDE,
        shown=SHOWN,
    )


def _printed(text: str) -> str:
    """The text in letters that every font has."""
    return text.encode("ascii", "replace").decode() or "nothing"


def drawn(found: dict[str, Any], batch_size: int) -> Figure:
    """The reward of every rollout, and every score of held-out words, along the images of the run."""
    figure = Figure(figsize=(6.5, 3.6), dpi=96, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curve, training = found["curve"], found["training"]
    along = [batch_size * iteration for iteration in range(1, len(training) + 1)]
    axes.plot(along, training, color="0.75", label="letters that the engine reads, while training")
    for name, title in SCORES.items():
        axes.plot([point["images"] for point in curve], [point[name] for point in curve], "o-", label=title)
    axes.set(xlabel="images generated and read", ylabel="mean score, held-out words", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def table(found: dict[str, Any]) -> str:
    """Both models' scores and what they were measured with, as Markdown."""
    lines = ["| | before | after PPO |", "|---|---|---|"]
    lines += [
        f"| {title} | {100 * found['before'][name]:.1f} % | {100 * found['after'][name]:.1f} % |"
        for name, title in SCORES.items()
    ]
    reader, images = found["engine"], found["images"]
    note = (
        f"{found['samples']} images of held-out words per column, with the same noise; {images:,} images in "
        f"{found['iterations']} of the recipe's {found['planned']} iterations. {reader['name']} "
        f"{reader['version']} takes {reader['milliseconds']:.0f} ms of one thread per image "
        f"({found['machine']['label']}), and reads {100 * reader['reads']:.1f} % of the task's own pictures."
    )
    return "\n".join([*lines, "", note])


def main(arguments: list[str]) -> int:
    try:
        record(*map(Path, arguments[:1]))
    except (TypeError, ValueError) as error:
        print(f"ocr: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
