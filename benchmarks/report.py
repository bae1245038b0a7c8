"""What every benchmark ends with: its figures, one a line, and on request a dated page.

A page names the command, the commit, the machine and the versions, so that a figure can be traced
and measured again. A benchmark whose correctness gate fails prints why and exits non-zero.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rellax_ds import runtime

if TYPE_CHECKING:
    from collections.abc import Sequence

REPORTS = Path(__file__).resolve().parent / "reports"


@dataclass
class Report:
    """Figures, tables and failed checks of one run.

    Attributes:
        title: Name of the page.
        figures: Name to value, in the order they are printed.
        failures: What the correctness gate found; empty when all is well.
        body: Markdown blocks between the figures and the end of the page.
    """

    title: str
    figures: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; floats are shown with four significant digits."""
        lines = [_row(header), _row(["---"] * len(header)), *(_row(row) for row in rows)]
        self.body.append("\n".join(lines))

    def check(self, passed: bool, failure: str) -> None:
        """Record one check of the correctness gate."""
        if not passed:
            self.failures.append(failure)

    def finish(self, write: bool, commit: str | None = None) -> int:
        """Print failures and figures, write the page if asked; returns the exit status.

        Args:
            write: Whether the dated page is written into `benchmarks/reports`.
            commit: Commit that was measured; by default the checkout's own.
        """
        if write and not self.failures:
            self._write(commit or runtime.source_commit() or "an unknown commit")
        for block in self.body:
            print(block, end="\n\n")
        for failure in self.failures:
            print(f"gate failed: {failure}")
        for name, value in self.figures.items():
            print(f"FIGURE {name} {value:.6f}")
        return 1 if self.failures else 0

    def _write(self, commit: str) -> None:
        today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        versions = ", ".join(f"{k} {v}" for k, v in runtime.versions().items())
        spec = sys.modules["__main__"].__spec__
        name = spec.name if spec is not None else Path(sys.argv[0]).name
        command = shlex.join(["python", "-m", name, *sys.argv[1:]])
        blocks = [
            f"# {self.title}, {today}",
            f"`{command}` at {commit[:12]}{'+' * commit.endswith('+')} on {os.cpu_count()} cores "
            f"({platform.machine()}); {versions}.",
            "\n".join(
                [_row(["figure", "value"]), _row(["---"] * 2), *map(_row, self.figures.items())]
            ),
            *self.body,
        ]
        path = REPORTS / f"{today}-{self.title.replace(' ', '_')}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the flag every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--report", action="store_true", help="write a dated page into reports/")
    return made


def _row(cells: Sequence[object]) -> str:
    shown = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
    return f"| {' | '.join(shown)} |"
