"""The command line: typed settings in, one clean line for what is wrong. Heavy imports wait for a command."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, make_dataclass, replace
from functools import reduce
from importlib.metadata import version
from itertools import takewhile
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, get_args

import tyro

from lacfast.config.checks import Config, Count, Positive, Seed
from lacfast.config.choice import Choice, parse, usage, variants
from lacfast.config.unread import made as _made
from lacfast.report.commands import Compare, Report, Watch
from lacfast.runs.config import EvaluationRun, RunConfig, SteeringRun
from lacfast.runs.help import PAGES, asked, fitted, footer, settings_of
from lacfast.runs.recipes import Recipe, find_recipe, is_file, recipe_names, recipes
from lacfast.runs.usage import refusal
from lacfast.runs.warned import plain_warnings
from lacfast.runtime.signals import raised

FIRST_TELLS_SECONDS = 10.0
"""How long a rank stays that leaves a wrong command line to the first: its imports may take longer there."""


@dataclass(frozen=True, kw_only=True)
class Demo(Config):
    """Pretrain a tiny diffusion model, teach it with its own critic to obey its prompts, and show it."""

    out: Path
    """Directory for summary.json, metrics.jsonl, images/, report.html and the models."""
    budget: Positive = 465.0
    """Seconds in all; reinforcement learning gets what the other phases leave."""
    seed: Seed = 0
    """Seed of weights, prompts and noise."""
    backbone: Literal["dit", "unet"] = "dit"
    """dit: SD3's transformer; unet: Stable Diffusion's, slower on a CPU: give it a larger budget."""
    processes: Count = 2
    """Processes that sample and train together, each on one thread: one for each core to use."""
    quick: bool = False
    """Cut every phase short: shows that it runs, not that it learns. Stops long before the budget."""

    def run(self) -> None:
        from lacfast.runs.demo import FULL, QUICK, QUICK_BUDGET, run_demo
        from lacfast.runs.terminal import show_summary

        budget = min(self.budget, QUICK_BUDGET) if self.quick else self.budget
        scale = QUICK if self.quick else FULL
        summary = run_demo(
            self.out,
            budget=budget,
            seed=self.seed,
            backbone=self.backbone,
            processes=self.processes,
            scale=scale,
        )
        show_summary(summary, self.out)


@dataclass(frozen=True, kw_only=True)
class Info:
    """Versions, processor, CUDA, and which kernels are usable here and why others are not."""

    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        from rich.console import Console

        from lacfast.runs import environment

        if self.json:
            print(json.dumps(environment.describe(), indent=2))
        else:
            # Lines are not broken where no terminal bounds them.
            environment.show(Console(width=None if sys.stdout.isatty() else 200))


@dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluationRun):
    """Score images of a saved model, without training it."""

    def run(self) -> None:
        from lacfast.distributed import joined
        from lacfast.runs.evaluate import evaluate_model
        from lacfast.runs.terminal import show_scores

        with joined() as world:
            evaluation = evaluate_model(self)
            if world.is_first:
                show_scores(evaluation)


@dataclass(frozen=True, kw_only=True)
class Steer(SteeringRun):
    """Make images with the help of a model's critic: guidance, pruning, particles, beams."""

    def run(self) -> None:
        from lacfast.distributed import joined
        from lacfast.runs.steer import steer_model
        from lacfast.runs.terminal import show_steering

        with joined() as world:
            stats = steer_model(self)
            if world.is_first:
                show_steering(stats, self.out)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model; a recipe, by name or file, says how, every setting is a flag after it."""

    settings: Annotated[RunConfig, tyro.conf.arg(name="")]

    def run(self) -> None:
        from lacfast.distributed import joined
        from lacfast.runs.plan import plan
        from lacfast.runs.terminal import show_iteration, show_plan
        from lacfast.runs.train import train

        if self.settings.dry_run:
            show_plan(self.settings, plan(self.settings, ranks=self.settings.planned_gpus))
            return
        with joined() as world:
            checkpoint = train(self.settings, show_iteration)
            if world.is_first:
                print(f"checkpoint: {checkpoint}")


Command = Demo | Train | Evaluate | Steer | Report | Watch | Compare | Info


def _commands(train: type[Train]) -> Any:
    """The commands as the parser takes them."""
    flat: Any = tyro.conf.OmitArgPrefixes
    known: dict[str, Any] = {
        "demo": flat[Demo],
        "train": train,
        "evaluate": Evaluate,
        "steer": Steer,
        "report": flat[Report],
        "watch": flat[Watch],
        "compare": flat[Compare],
        "info": flat[Info],
    }
    return reduce(or_, (_subcommand(name, kind) for name, kind in known.items()))


def _subcommand(name: str, kind: Any) -> Any:
    annotated: Any = Annotated
    return annotated[kind, tyro.conf.subcommand(name)]


def _train(known: Mapping[str, Recipe]) -> type[Train]:
    """Train with a subcommand per recipe; an optional part of one becomes flags of its own, no subcommand."""
    annotated: Any = Annotated
    settings = tyro.extras.subcommand_type_from_defaults(
        {name: recipe.settings for name, recipe in known.items()},
        {name: recipe.summary for name, recipe in known.items()},
    )
    field = ("settings", annotated[settings, tyro.conf.AvoidSubcommands, tyro.conf.arg(name="")])
    return make_dataclass(
        "Train", [field], bases=(Train,), namespace={"__doc__": Train.__doc__}, frozen=True, kw_only=True
    )


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _one_word(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Choice | None] | None:
    """A choice is one word with its settings, as in `--train.ppo.clip nats:5`, and no subcommand."""
    known = variants(info.type)
    if not known:
        return None
    optional = type(None) in get_args(info.type)

    def made(words: list[str]) -> Choice | None:
        try:
            return None if optional and words[0] == "none" else parse(words[0], known)
        except ValueError as error:
            raise _SettingsError(str(error), words[0]) from error

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="none|" * optional + usage(known),
        instance_from_str=made,
        is_instance=lambda value: isinstance(value, tuple(known.values())) or (optional and value is None),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


class _SettingsError(Exception):
    """What settings refuse when they are made, and the word that they were; of a ValueError the parser would
    make a box of its own."""


@_REGISTRY.struct_rule
def _own_errors(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """Settings whose errors are told as those of a command are."""
    if not (isinstance(info.type, type) and issubclass(info.type, Config)) or _REGISTRY in info.markers:
        return None
    whole = _usual(info, _REGISTRY)

    def made(**settings: Any) -> Any:
        try:
            return _made(info.type, settings, info.default)
        except ValueError as error:
            raise _SettingsError(str(error)) from error

    return replace(whole, fields=tuple(map(_told_default, whole.fields)), instantiate=made)


def _usual(
    info: tyro.constructors.StructTypeInfo, registry: tyro.constructors.ConstructorRegistry
) -> tyro.constructors.StructConstructorSpec:
    """How a structure is read without the rule of `registry`, which leaves alone what has its marker."""
    marked = replace(info, markers=(*info.markers, registry))
    whole = tyro.constructors.ConstructorRegistry.get_struct_spec(marked)
    assert isinstance(whole, tyro.constructors.StructConstructorSpec)
    return whole


def _told_default(field: Any) -> Any:
    """A field of a structure whose help says "none" of a default that has no words, and would say nothing."""
    if field.default != ():
        return field
    annotated: Any = Annotated
    hint = tyro.conf.arg(help_behavior_hint="(default: none)")
    return replace(field, type=annotated[field.type, hint])


def _page(shown: Mapping[type, tuple[str, ...]]) -> tyro.constructors.ConstructorRegistry:
    """What reads a command's settings, and shows only these of them in its help."""
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_one_word)

    @registry.struct_rule
    def some(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        kinds = info.type.__mro__ if isinstance(info.type, type) else ()
        names = next((shown[kind] for kind in kinds if kind in shown), None)
        if names is None or registry in info.markers:
            return None
        whole = _usual(info, registry)
        hidden: Any = tyro.conf.Suppress
        fields = (
            _told_default(field) if field.name in names else replace(field, type=hidden[field.type])
            for field in whole.fields
        )
        return replace(whole, fields=tuple(fields))

    return registry


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code, see lacfast.runs.endings. A bug of ours is raised."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            with raised(), plain_warnings():
                try:
                    command = _parsed(arguments)
                    if not isinstance(command, Train | Evaluate | Steer):
                        _require_one_process(type(command).__name__.lower())
                except ValueError as error:
                    _leave_to_first(error)
                    raise
                command.run()
        finally:
            # Here, where it can be said that nobody reads; not when the interpreter ends.
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        from lacfast.runs.endings import ending

        if (found := ending(error)) is None:
            raise
        if found.line:
            print(f"lacfast: {found.line}", file=sys.stderr)
        else:
            # What is still buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return found.code
    return 0


def _require_one_process(command: str) -> None:
    """
    Raises:
        ValueError: under a launcher of several processes, which would all do the same.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"lacfast {command} is started as one process; start it without torchrun")


def _leave_to_first(error: ValueError) -> None:
    """
    Raises:
        ToldElsewhereError: on every rank but the first: the command line is the same on all of them.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        from lacfast.distributed import ToldElsewhereError

        # A launcher ends all where one ends, and the first may be slower to read its command line.
        with suppress(KeyboardInterrupt):
            time.sleep(FIRST_TELLS_SECONDS)
        raise ToldElsewhereError(str(error)) from error


def _parsed(arguments: list[str]) -> Command:
    if arguments == ["--version"]:
        print(f"lacfast {version('lacfast')}")
        raise SystemExit(0)
    trains = arguments[:1] == ["train"]
    named = [word for word in arguments[1:2] if trains and not word.startswith("-")]
    # What names none is refused here, where it is known that it should; one needs no other read or searched.
    own = {word: find_recipe(word) for word in named}
    topic = asked(arguments)
    command = _understood(arguments)
    registry, printed = _REGISTRY, [*arguments]
    if topic is not None:
        registry = _page(settings_of(arguments[0], topic))
        printed = [*arguments[: PAGES[arguments[0]].words], "--help"]
    refused, told = io.StringIO(), _Told(sys.stdout)
    try:
        with redirect_stderr(refused), redirect_stdout(told):
            return tyro.cli(  # type: ignore[no-any-return]
                _commands(_train(own or recipes()) if trains else Train),
                prog="lacfast",
                description="Latent actor-critic post-training of diffusion models. "
                "--version tells the version.",
                args=["--help" if word == "--help-all" else word for word in printed],
                config=(tyro.conf.FlagCreatePairsOff,),
                registry=registry,
            )
    except _SettingsError as error:
        message, *word = error.args
        flag = f"{arguments[arguments.index(*word) - 1]}: " if word and word[0] in arguments else ""
        raise ValueError(flag + message) from error
    except SystemExit as stopped:
        if stopped.code:
            raise ValueError(refusal(refused.getvalue(), arguments, command)) from None
        text = told.getvalue().rstrip("\n")
        if topic is not None:
            text += f"\n\n{footer(arguments[0], command, topic)}"
        print(fitted(text, shutil.get_terminal_size().columns))
        raise


class _Told(io.StringIO):
    """Keeps what is printed, in the colours of where it goes."""

    def __init__(self, goes_to: TextIO) -> None:
        super().__init__()
        self._goes_to = goes_to

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._goes_to.encoding or "utf-8"

    def isatty(self) -> bool:
        return self._goes_to.isatty()


def _understood(arguments: list[str]) -> str:
    """The command that the arguments begin with."""
    commands = [
        kind.__name__.lower() for kind in (Demo, Train, Evaluate, Steer, Report, Watch, Compare, Info)
    ]
    files = [word for word in arguments[1:2] if is_file(word)]
    known = (commands, [*recipe_names(), *files] if arguments[:1] == ["train"] else ())
    words = takewhile(lambda pair: pair[0] in pair[1], zip(arguments, known, strict=False))
    return " ".join(["lacfast", *(word for word, _ in words)])


if __name__ == "__main__":
    sys.exit(main())
