"""What a page names exists: files, modules, attributes, fields, commands and their options."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import io
import re
import runpy
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import lacfast.config
from lacfast import cli, ops
from lacfast.config.advantages import COMBINATIONS, ESTIMATORS
from lacfast.config.critic import TRUNKS, VALUE_LOSSES
from lacfast.config.steering import GUIDANCE_FORMS, STEERING_METHODS
from lacfast.rewards.names import registered_rewards
from lacfast.runs.config import RunConfig
from lacfast.runs.recipes import recipe_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("kernels/*.md"), *ROOT.glob("docs/**/*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
ROOMS = (ROOT, ROOT / "lacfast")
"""Where a path on a page may start, besides the page's own folder."""
CONFIGS = {name: value for name, value in vars(lacfast.config).items() if is_dataclass(value)} | {
    "RunConfig": RunConfig
}
"""Settings that pages name without their module."""


FOREIGN = {
    "true_cfg_scale", "force_zeros_for_empty_prompt", "pytorch_lora_weights", "channels_last", "dram__bytes",
    "nvtx_gpu_proj_sum", "group_rewards", "group_strict_rewards",
    "flow_grpo", "sd3_sde_with_logprob", "stat_tracking", "ode_step_with_logprob", "ddpo_pytorch",
    "diffusers_patch", "ddim_with_logprob", "mean_ref", "std_dev_t", "train_adam_", "num_image_per_prompt",
    "run_sampling", "trainable_layers", "stat_tracker", "rgb_with_grad",
    "dataset_dir", "model_name_or_path", "finetune_type", "lora_alpha", "resume_path", "kl_beta", "kl_type",
    "advantage_aggregation", "global_std", "adv_clip_range", "num_inference_steps", "group_size", "eval_freq",
    "unique_sample_num_per_epoch", "gradient_step_per_epoch", "ema_update_interval", "num_sde_steps",
    "enable_gradient_checkpointing", "dynamics_type", "sde_steps", "reward_model", "trainer_type",
    "num_processes",
    "num_batches_per_epoch", "gradient_accumulation_steps", "adv_clip_max", "reward_fn", "prompt_fn",
}  # fmt: skip
"""What pages say of diffusers, Nsight, reward servers and the peers' scripts."""


def links(text: str, folder: Path) -> Iterator[str]:
    """Relative links that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, _ = target.partition("#")
        if path and not re.match(r"\w+:", path) and not (folder / path).exists():
            yield f"link {target}"


def paths(text: str, folder: Path) -> Iterator[str]:
    """Paths in code that start in a folder of ours or end like a source file; NAME stands for any name."""
    for token in _tokens(text):
        if not re.fullmatch(r"[\w.][\w./-]*", token) or "/" not in token or "..." in token:
            continue
        ours = (ROOT / token.partition("/")[0]).is_dir() and not token.startswith(("runs/", "build/"))
        if not ours and not re.search(r"\.(py|md|cpp|cu|h|inc)$", token):
            continue
        pattern = re.sub(r"\b[A-Z]{4,}\b(?!\.md)", "*", token.rstrip("/"))
        if not any(next(room.glob(pattern), None) for room in (*ROOMS, folder)):
            yield f"path {token}"


def names(text: str, folder: Path) -> Iterator[str]:
    """Dotted names of lacfast and bench, and Config.field."""
    for name in re.findall(r"(?<![\w./-])lacfast(?:\.[A-Za-z_]\w*)+(?![\w/])", text):
        if not (ROOT / name).exists() and not _resolves(name):
            yield f"name {name}"
    for name in re.findall(r"\bbench(?:\.[a-z_]\w*)+", "\n".join(_tokens(text))):
        if not (path := ROOT / name.replace(".", "/")).is_dir() and not path.with_suffix(".py").exists():
            yield f"name {name}"
    for owner, field in re.findall(r"\b([A-Z]\w+)\.([a-z]\w*)", " ".join(_tokens(text))):
        if owner in CONFIGS and not _has(CONFIGS[owner], field):
            yield f"field {owner}.{field}"


def words(text: str, folder: Path) -> Iterator[str]:
    """Names with an underscore in inline code that our sources never say."""
    for code_text in re.findall(r"`([^`\n]+)`", text):
        for word in re.findall(r"\b[a-z]\w*_\w+\b", code_text):
            if word not in _said() | FOREIGN:
                yield f"word {word}"


def constants(text: str, folder: Path) -> Iterator[str]:
    """Names that a page says are in a file, and are not."""
    for name, path in re.findall(r"`(\w+)` (?:in|of)\s`([\w/]+\.py)`", text):
        home = next((room / path for room in (*ROOMS, folder) if (room / path).exists()), None)
        if home is not None and not re.search(rf"\b{name}\b", home.read_text(encoding="utf-8")):
            yield f"{name} in {path}"


def code(text: str, folder: Path) -> Iterator[str]:
    """Imports of Python blocks, and keywords of what they call from lacfast; of configs in the text too."""
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        yield from _calls(ast.parse(block), {"lacfast": lacfast})
    for line in re.findall(r"(?:^\+?|`)(from lacfast[\w.]* import [^`\n(]+)", text, re.MULTILINE):
        yield from _calls(ast.parse(line), {})
    for token in re.findall(r"`([^`\n]+)`", text):
        with contextlib.suppress(SyntaxError):
            yield from _calls(ast.parse(token, mode="eval"), dict(CONFIGS))


def commands(text: str, folder: Path) -> Iterator[str]:
    """Modules and scripts that Python runs, subcommands and recipes of lacfast, and the options of both."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    lines = [
        line
        for block in re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    for line in lines + re.findall(r"`([^`\n]+)`", text):
        for command in line.partition(" #")[0].split(" && "):
            yield from _command(command)
    # Those that another program takes stand in one of the page's own commands.
    elsewhere = {option for line in lines for option in _given(line.split())}
    for option in re.findall(r"`(--[a-z][\w.-]+)", text):
        if option not in _all_options() | elsewhere:
            yield f"option {option}"


CHECKS = (links, paths, names, words, constants, code, commands)


def _tokens(text: str) -> Iterator[str]:
    """Words of inline and fenced code."""
    for fenced, inline in re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, re.DOTALL):
        yield from re.split(r"[\s,;:=()\"']+", fenced or inline)


@functools.cache
def _said() -> frozenset[str]:
    """Words of our sources, and names of tracked files."""
    sources = [
        path
        for folder in ("lacfast", "kernels", "bench", "csrc", "tests", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".pyi", ".cpp", ".cu", ".h", ".inc"} and path != Path(__file__).resolve()
    ]
    text = " ".join(path.read_text(encoding="utf-8") for path in sources if "tests" not in path.parts)
    return frozenset(re.findall(r"\w+", text)) | {path.stem for path in sources}


def _has(owner: Any, name: str) -> bool:
    return hasattr(owner, name) or (is_dataclass(owner) and name in {field.name for field in fields(owner)})


def _resolves(name: str) -> bool:
    """Whether `name` is a module or what one holds."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            if not _has(found, attribute):
                return False
            found = getattr(found, attribute, None)
        return True
    return False


def _calls(tree: ast.AST, known: dict[str, Any]) -> Iterator[str]:
    """What does not exist of a block's imports from lacfast and the keywords of its calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lacfast"):
            for alias in node.names:
                if not _resolves(f"{node.module}.{alias.name}"):
                    yield f"import {node.module}.{alias.name}"
                else:
                    home = importlib.import_module(str(node.module))
                    known[alias.asname or alias.name] = getattr(home, alias.name, None)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and callable(function := _value(node.func, known)):
            accepted = inspect.signature(function).parameters
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
                continue
            for keyword in node.keywords:
                if keyword.arg is not None and keyword.arg not in accepted:
                    yield f"argument {keyword.arg} of {ast.unparse(node.func)}"


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    """What a dotted name stands for, None where it is not ours."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _value(node.value, known)) is not None:
        return getattr(owner, node.attr, None)
    return None


def _command(command: str) -> Iterator[str]:
    words = [word for word in command.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program = words[0].rpartition("/")[2] if words else ""
    if program.startswith("python") and len(words) > 2 and words[1] == "-m":
        path = ROOT / words[2].replace(".", "/")
        if not words[2].startswith(("bench", "lacfast")):
            return
        yield from _script(path.with_suffix(".py") if not path.is_dir() else path / "__main__.py", words[3:])
    elif program.startswith("python") and len(words) > 1 and words[1].endswith(".py"):
        yield from _script(ROOT / words[1], words[2:])
    elif program == "lacfast" and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
        if words[1] not in SUBCOMMANDS:
            yield f"subcommand {words[1]}"
            return
        recipe = words[2] if words[1] == "train" and len(words) > 2 else ""
        if re.fullmatch(r"[a-z][a-z0-9-]+", recipe) and recipe not in recipe_names():
            yield f"recipe {recipe}"
        for option in _given(words):
            if option not in _options(words[1]):
                yield f"option {option} of lacfast {words[1]}"


def _script(path: Path, arguments: list[str]) -> Iterator[str]:
    if not path.exists():
        yield f"script {path.relative_to(ROOT)}"
        return
    source = path.read_text(encoding="utf-8")
    for option in _given(arguments):
        if f'"{option}"' not in source:
            yield f"option {option} of {path.relative_to(ROOT)}"


def _given(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]


SUBCOMMANDS = ("demo", "train", "evaluate", "steer", "report", "watch", "compare", "info")


@functools.cache
def _options(subcommand: str) -> set[str]:
    """Options that the command line's own help names."""
    printed = io.StringIO()
    recipe = ["shapes"] if subcommand == "train" else []
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        cli.main([subcommand, *recipe, "--help-all"])
    assert stopped.value.code == 0
    return {"--help-all", *re.findall(r"--[a-z][\w.-]*", printed.getvalue())}


@functools.cache
def _all_options() -> set[str]:
    """Of lacfast's subcommands and of all benches, for options that the text names alone."""
    found = {option for subcommand in SUBCOMMANDS for option in _options(subcommand)}
    for path in (ROOT / "bench").rglob("*.py"):
        found |= set(re.findall(r'"(--[a-z][\w-]*)"', path.read_text(encoding="utf-8")))
    return found


def problems(text: str, folder: Path = ROOT) -> list[str]:
    """What a page names and the repository does not have."""
    return [problem for check in CHECKS for problem in check(text, folder)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    assert problems(page.read_text(encoding="utf-8"), page.parent) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[here](docs/nowhere.md)", "link docs/nowhere.md"),
        ("`lacfast/nowhere.py`", "path lacfast/nowhere.py"),
        ("`backbones/nowhere.py`", "path backbones/nowhere.py"),
        ("`csrc/nowhere/NAME.h`", "path csrc/nowhere/NAME.h"),
        ("the logger lacfast.nowhere", "name lacfast.nowhere"),
        ("`lacfast.config.PPOConfig.nothing`", "name lacfast.config.PPOConfig.nothing"),
        ("`bench.nowhere` writes it", "name bench.nowhere"),
        ("`NOTHING` in `lacfast/schedule.py`", "NOTHING in lacfast/schedule.py"),
        ("`no_such_option` does it", "word no_such_option"),
        ("`PPOConfig.nothing`", "field PPOConfig.nothing"),
        ("`PPOConfig(nothing=1)`", "argument nothing of PPOConfig"),
        ("```python\nlacfast.TrainConfig(nothing=1)\n```", "argument nothing of lacfast.TrainConfig"),
        ("```python\nfrom lacfast.ops import nothing\n```", "import lacfast.ops.nothing"),
        ("`from lacfast.ops import nothing`", "import lacfast.ops.nothing"),
        ("`python -m bench.nowhere`", "script bench/nowhere.py"),
        ("`python bench/nowhere.py`", "script bench/nowhere.py"),
        ("`python -m bench.kernels --nothing`", "option --nothing of bench/kernels.py"),
        ("```bash\nlacfast dream\n```", "subcommand dream"),
        ("`lacfast train nothing`", "recipe nothing"),
        ("`lacfast train shapes --train.nothing 1`", "option --train.nothing of lacfast train"),
        ("`--train.nothing`", "option --train.nothing"),
    ],
)
def test_a_wrong_name_is_found(text: str, problem: str) -> None:
    assert problem in problems(text)


@pytest.mark.parametrize(
    ("page", "column", "known"),
    [
        ("critic", "`trunk`", set(TRUNKS) - {"none"}),
        ("critic", "`loss`", VALUE_LOSSES),
        ("advantages", "`estimator`", ESTIMATORS),
        ("advantages", "`combination`", COMBINATIONS),
        ("steering", "`method`", STEERING_METHODS),
        ("steering", "`guidance_form`", GUIDANCE_FORMS),
        ("training", "recipe", recipe_names()),
        ("rewards", "name", registered_rewards()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_of_choices_has_all_of_them(page: str, column: str, known: Collection[str]) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    table = re.search(rf"^\| {re.escape(column)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table is not None
    named = [name for row in table[1].splitlines() for name in re.findall(r"`(\w[\w-]*)`", row.split("|")[1])]
    assert set(named) - {"RemoteReward", "Judge", "UnifiedReward"} == set(known)


def test_the_api_has_every_public_name() -> None:
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in shown if not _resolves(name)] == []
    assert {*lacfast.__all__, *ops.__all__} <= {name.rpartition(".")[2] for name in shown}


@pytest.mark.parametrize("name", ["structure", "errors"])
def test_a_generated_page_is_what_its_script_writes(name: str) -> None:
    script = runpy.run_path(str(ROOT / "docs" / f"{name}.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), f"run `python docs/{name}.py`"
