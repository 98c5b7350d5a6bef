"""Everything that only a GPU can tell, in one command on any CUDA machine.

    python bench/gpu_check.py                          tests, kernels, profile
    python bench/gpu_check.py --only sampling,update,iteration
    python bench/gpu_check.py --only kernels --out PATH
    python bench/gpu_check.py --only tune              also changes kernels/launches.json
    python bench/gpu_check.py --only learning          a slice of the learning runs; call it again to go on
    python bench/gpu_check.py --device cpu             a rehearsal with tiny sizes
    python bench/gpu_check.py --tiny --only kernels,iteration  the same of some parts on a GPU

Each part is a process of its own with a time limit, so one that crashes costs the others nothing. The result
is written after every part, to bench/results/GPU-DATE.json by default; the table comes last. Exit code 1 says
that a part failed. lacfast need not be installed: the source tree is enough for Triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    # As a script, Python put bench/ first on the path, whose profile.py hides the standard library's.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from bench import machine  # noqa: E402
from bench.learning import units  # noqa: E402
from bench.timed_parts import TAIL, Part, judged, left_in, run  # noqa: E402

SANITIZERS = ("memcheck", "racecheck")
"""Tools of compute-sanitizer."""
SANITIZED = ("-k", "float64 and bfloat16")
"""They slow a kernel a hundredfold, so one dtype of every op, forward and backward."""


@dataclass(frozen=True)
class Setting:
    """What every part is told."""

    device: str
    seconds: float
    """Limit of each part."""
    folder: Path
    """For the files that parts leave."""
    learning: Path = ROOT / "runs" / "learning-gpu"
    """Curves, base models and unfinished runs of the part "learning", which goes on from them."""
    claims: tuple[str, ...] = ()
    """Claims of bench.learning; empty: "baselines"."""
    tiny: bool = False
    """Sizes of a rehearsal; a CPU has no others."""

    @property
    def is_rehearsal(self) -> bool:
        return self.tiny or self.device == "cpu"


def tests(setting: Setting) -> Part:
    """GPU tests, then the kernels among them under compute-sanitizer where it is installed."""
    if setting.device == "cpu":
        return Part("skipped", "the tests of tests/test_gpu*.py need a CUDA device")
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *gpu_tests()]
    code, output = run(command, setting.seconds)
    summary = test_counts(output)
    part = judged(code, output, setting.seconds, summary, {"pytest": summary})
    sanitizer = shutil.which("compute-sanitizer")
    if part.is_failure or sanitizer is None:
        part.summary += f"; compute-sanitizer {'not installed' if sanitizer is None else 'not run'}"
        return part
    for tool in SANITIZERS:
        left = setting.seconds - (time.monotonic() - start)
        if left < 30:
            part.summary += f"; {tool}: no time left"
            break
        checked = [sanitizer, "--tool", tool, "--error-exitcode", "86", *command, *SANITIZED]
        # Without the caching allocator every tensor has bounds of its own to be checked.
        code, output = run(checked, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        outcome = test_counts(output) if code == 0 else "stopped" if code is None else f"exit code {code}"
        part.result[tool] = outcome
        part.summary += f"; {tool}: {outcome}"
        if code != 0:
            part.status, part.output = "failed" if code else "timed out", output[-TAIL:]
            break
    return part


def gpu_tests() -> list[str]:
    """The files of tests that need a CUDA device, relative to the checkout."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_gpu*.py"))


def test_counts(output: str) -> str:
    """pytest's last line, such as "31 passed, 2 skipped in 40.1s"."""
    lines = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|error).*? in [\d.]+s)", output, re.MULTILINE)
    return lines[-1] if lines else "pytest did not finish"


def kernels(setting: Setting) -> Part:
    """The kernel table of bench/kernels.py."""
    out = setting.folder / "kernels.json"
    command = [sys.executable, "-m", "bench.kernels", "--device", setting.device, "--out", str(out)]
    if setting.is_rehearsal:
        command += ["--cases", "tiny", "--no-compile", "--budget", "0.05"]
    # It stops by itself first, so that its last rows are not lost in the middle.
    code, output = run([*command, "--seconds", str(0.85 * setting.seconds)], setting.seconds)
    print(output, end="")
    result = left_in(out)
    rows, missing = result.get("rows", []), result.get("missing", {})
    errors = [row for row in rows if "error" in row]
    summary = f"{len(rows)} rows, {len(missing)} workloads missing, {len(errors)} providers failed"
    return judged(code, output, setting.seconds, summary, result)


def tune(setting: Setting) -> Part:
    """Launch tables of this architecture, written into the tree."""
    if setting.device == "cpu":
        return Part("skipped", "launches are measured on a CUDA device")
    out = setting.folder / "tune.json"
    command = [sys.executable, "-m", "bench.tune", "--out", str(out), "--seconds", str(0.9 * setting.seconds)]
    code, output = run(command, setting.seconds)
    print(output, end="")
    result = left_in(out)
    finished = ", ".join(result.get("rows", {})) or "none"
    return judged(code, output, setting.seconds, f"tuned: {finished}", result)


def engine(setting: Setting, module: str, arguments: list[str]) -> Part:
    """A part that runs diffusers' models: rows of a bench that stops by itself before its limit."""
    if importlib.util.find_spec("diffusers") is None:
        return Part(
            "skipped", f"{module} needs diffusers, transformers and peft; install them or carry wheels"
        )
    out = setting.folder / f"{arguments[0] if arguments else module}.json"
    command = [sys.executable, "-m", module, *arguments, "--device", setting.device, "--out", str(out)]
    code, output = run([*command, "--seconds", str(0.8 * setting.seconds)], setting.seconds)
    print(output, end="")
    result = left_in(out)
    rows, missing = result.get("rows", []), result.get("missing", {})
    errors = [row for row in rows if "error" in row]
    summary = f"{len(rows)} rows, {len(errors)} arms failed; missing: {', '.join(missing) or 'none'}"
    return judged(code, output, setting.seconds, summary, result)


def sampling(setting: Setting) -> Part:
    """A denoising step of every model in four arms, and what its values cost."""
    return engine(setting, "bench.gpu_arms", ["sampling", *["--tiny"] * setting.is_rehearsal])


def update(setting: Setting) -> Part:
    """A (sample, step) pair of an update in the same arms."""
    return engine(setting, "bench.gpu_arms", ["update", *["--tiny"] * setting.is_rehearsal])


def iteration(setting: Setting) -> Part:
    """Whole iterations beside the peers' loops."""
    return engine(setting, "bench.iteration", ["--quick", "--models", "dit"] if setting.is_rehearsal else [])


def learning(setting: Setting) -> Part:
    """A slice of the learning runs at the scale of a GPU; the next call goes on where it stopped."""
    if importlib.util.find_spec("diffusers") is None:
        return Part("skipped", "bench.learning needs diffusers, transformers and peft; install them")
    folder, scale = setting.learning, "rehearsal" if setting.is_rehearsal else "gpu"
    claims = setting.claims or (("budget",) if setting.is_rehearsal else ("baselines",))
    command = [sys.executable, "-m", "bench.learning", *claims, "--device", setting.device]
    command += ["--scale", scale, "--out", str(folder)]
    # An iteration, an evaluation or a base model that has begun is not cut short.
    command += ["--materials", str(folder / "materials"), "--minutes", str(0.7 * setting.seconds / 60)]
    code, output = run(command, setting.seconds)
    print(output, end="")
    studies = (units.studies(claim) for claim in sorted(folder.glob("*/")) if claim.name != "materials")
    curves = [
        f"{study.relative_to(folder).as_posix()}/{key}"
        for study in chain.from_iterable(studies)
        for key in units.load(study)
        if "-seed" in key
    ]
    page = next(iter(folder.glob("results*.md")), None)
    text = "" if page is None else page.read_text(encoding="utf-8")
    open_claims = [
        line[2:] for line in text.splitlines() if line.startswith(tuple(f"- {c}," for c in claims))
    ]
    summary = f"{len(curves)} runs in {folder}; " + ("; ".join(open_claims) or "all of them")
    return judged(code, output, setting.seconds, summary, {"curves": curves, "missing": open_claims})


def profile(setting: Setting) -> Part:
    """torch.profiler's table of one op, and of training where diffusers is installed."""
    out = str(setting.folder / "profile")
    cases = "tiny" if setting.is_rehearsal else "claim"
    base = [sys.executable, "-m", "bench.profile"]
    options = ["--device", setting.device, "--out", out]
    code, output = run([*base, "op", "gaussian_step", "--cases", cases, *options], setting.seconds)
    print(output, end="")
    part = judged(code, output, setting.seconds, "gaussian_step", {"gaussian_step": output[-TAIL:]})
    if setting.is_rehearsal:
        return part
    if importlib.util.find_spec("diffusers") is None:
        part.summary += "; training skipped: diffusers is not installed"
        return part
    code, output = run([*base, "training", *options], setting.seconds / 2)
    print(output, end="")
    training = judged(code, output, setting.seconds, "", {})
    part.result["training"] = output[-TAIL:]
    part.summary += f"; training {training.status}"
    if training.is_failure:
        part.status, part.output = training.status, training.output
    return part


PARTS: dict[str, Callable[[Setting], Part]] = {
    "tests": tests,
    "kernels": kernels,
    "tune": tune,
    "sampling": sampling,
    "update": update,
    "iteration": iteration,
    "learning": learning,
    "profile": profile,
}
DEFAULT_PARTS = ("tests", "kernels", "profile")
"""tune changes the source tree, the models of sampling, update and iteration take minutes each, and learning
takes hours in slices, so these run only when they are asked for."""


TINY_PARTS = tuple(name for name in PARTS if name not in ("tests", "tune"))
"""Those that have sizes of a rehearsal on a GPU too."""


def check(
    names: list[str], setting: Setting, out: Path, parts: dict[str, Callable[[Setting], Part]]
) -> dict[str, Part]:
    """Run parts in turn and write `out` after each; one that raises has failed and the next one runs."""
    device = torch.device(setting.device)
    done: dict[str, Part] = {}
    for name in names:
        print(f"== {name}", flush=True)
        start = time.monotonic()
        try:
            done[name] = parts[name](setting)
        except Exception as error:
            done[name] = Part("failed", f"{type(error).__name__}: {error}")
        done[name].seconds = time.monotonic() - start
        if done[name].is_failure:
            print(done[name].output, file=sys.stderr)
        record = {
            "date": machine.today(),
            "machine": machine.describe(device),
            "parts": {part: asdict(outcome) for part, outcome in done.items()},
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return done


def table(done: dict[str, Part]) -> str:
    """One line per part."""
    lines = [f"{'part':<10}{'status':<11}{'s':>6}  what"]
    lines += [
        f"{name:<10}{part.status:<11}{part.seconds:>6.0f}  {part.summary}" for name, part in done.items()
    ]
    return "\n".join(lines)


class _Parts(argparse.Action):
    """Names separated by spaces, commas or both."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        names = [name for value in values for name in value.split(",") if name]
        unknown = [name for name in names if name not in PARTS]
        if unknown or not names:
            known = ", ".join(repr(name) for name in PARTS)
            parser.error(f"argument --only: unknown {', '.join(unknown) or 'nothing'}; known: {known}")
        setattr(namespace, self.dest, names)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="bench/gpu_check.py", description=__doc__.split("\n")[0])
    options.add_argument(
        "--only",
        nargs="+",
        action=_Parts,
        default=list(DEFAULT_PARTS),
        metavar="PART",
        help=f"of {', '.join(PARTS)}; separated by spaces or commas",
    )
    options.add_argument("--seconds", type=float, default=540.0, help="limit of each part")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument(
        "--tiny",
        action="store_true",
        help=f"sizes of a rehearsal, of {', '.join(TINY_PARTS)}; always so on a CPU",
    )
    options.add_argument("--out", type=Path, help="JSON; default bench/results/GPU-DATE.json")
    options.add_argument(
        "--learning",
        type=Path,
        default=Setting.learning,
        help="folder that `learning` keeps and goes on from",
    )
    options.add_argument("--claims", nargs="+", default=(), help="of `learning`; default: baselines")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    full_only = [name for name in options.only if name not in TINY_PARTS]
    if options.tiny and options.device == "cuda" and full_only:
        known = ", ".join(TINY_PARTS)
        print(
            f"gpu_check: --tiny would be ignored by {', '.join(full_only)} on a GPU; name parts of {known} "
            "with --only, or use --device cpu",
            file=sys.stderr,
        )
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: no CUDA device here; --device cpu rehearses with tiny sizes", file=sys.stderr)
        return 2
    label = re.sub(r"[^a-z0-9]+", "-", machine.label(torch.device(options.device)).lower()).strip("-")
    out = options.out or ROOT / "bench" / "results" / f"{label}-{machine.today()}.json"
    with tempfile.TemporaryDirectory() as folder:
        learning_folder, claims = options.learning.resolve(), tuple(options.claims)
        setting = Setting(
            options.device, options.seconds, Path(folder), learning_folder, claims, options.tiny
        )
        done = check(options.only, setting, out, PARTS)
    print(f"\n{out}\n{table(done)}")
    return 1 if any(part.is_failure for part in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
