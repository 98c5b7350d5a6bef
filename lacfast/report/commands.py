"""The commands that read a run, and what they are told. What they need is imported when they run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lacfast.config.checks import Config, Positive, Range
from lacfast.config.unread import Unread


@dataclass(frozen=True, kw_only=True)
class Report(Config):
    """Write report.html of a run: curves per step, the critic's value, pictures, and signs of failure."""

    UNREAD = (
        Unread(
            options=("port",),
            where=lambda report: not report.serve,
            because=lambda report: ": without --serve nothing listens",
            remedy="add --serve",
        ),
    )

    run_directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")]
    """Directory of `lacfast train`, or of any trainer with metrics_path."""
    serve: bool = False
    """Show the page on an address of this machine and renew it while the run goes on, until Ctrl-C."""
    port: Annotated[int, Range(least=0, most=65535)] = 8000
    """Port of that address; 0: one that is free."""

    def run(self) -> None:
        if not self.serve:
            from lacfast.report.run import write_run_report

            print(f"report: {write_run_report(self.run_directory)}")
            return
        from lacfast.report.serve import RunServer, serve

        server = RunServer(self.run_directory, self.port)
        print(f"report: {server.address}  (Ctrl-C ends it)", flush=True)
        serve(server)


@dataclass(frozen=True, kw_only=True)
class Watch(Config):
    """Show a run in the terminal while it goes on; once, where the output is no terminal."""

    run_directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")]
    """Directory of `lacfast train`, or of any trainer with metrics_path."""
    interval: Positive = 2.0
    """Seconds between two looks."""

    def run(self) -> None:
        from lacfast.report.watch import watch

        watch(self.run_directory, interval=self.interval)


@dataclass(frozen=True, kw_only=True)
class Compare(Config):
    """Lay runs over one another on one page, with what their settings differ in."""

    run_directories: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="DIRECTORY", help_behavior_hint="(required)"),
    ]
    """Two to six runs."""
    out: Path = Path("compare.html")
    """The page."""

    def run(self) -> None:
        from lacfast.report.compare import write_comparison

        print(f"comparison: {write_comparison(self.run_directories, self.out)}")
