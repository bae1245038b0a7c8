"""Sections with a time budget, and the JSON and Markdown report they fill.

A rented GPU is expensive and a driver is full of surprises, so nothing that goes wrong in one
section may cost another: a section that raises or runs out of time is recorded with what it had
found by then, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
import traceback
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


@dataclass
class Table:
    """One table of a section; rows are added as they are found."""

    title: str
    header: list[str]
    rows: list[list[Any]] = field(default_factory=list)


@dataclass
class Section:
    """What one section found.

    Attributes:
        name: Heading.
        budget: Seconds it may take.
        seconds: Seconds it took.
        failures: Why it did not pass; empty when it did.
        tables: Its results.
    """

    name: str
    budget: float
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def table(self, title: str, header: Sequence[str]) -> Table:
        """Start a table; its rows survive a failure later in the section."""
        self.tables.append(Table(title, list(header)))
        return self.tables[-1]

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """A part whose errors are recorded while the section goes on; running out of time is not
        one of them.
        """
        try:
            yield
        except TimeoutError:
            raise
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {error}")


class Suite:
    """Runs sections one after the other and writes the report.

    Attributes:
        environment: Facts about the machine, by name.
        sections: Finished sections.
    """

    def __init__(self, environment: dict[str, Any]) -> None:
        self.environment = environment
        self.sections: list[Section] = []

    def run(self, name: str, budget: float, work: Callable[[Section], None]) -> Section:
        """Run a section within `budget` seconds; its errors are recorded, not raised."""
        section = Section(name, budget)
        self.sections.append(section)
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        try:
            with alarm(budget):
                work(section)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
            section.failures.append(f"{type(error).__name__} at {where}: {error}")
        section.seconds = time.monotonic() - started
        for failure in section.failures:
            print(f"  failed: {failure}", flush=True)
        return section

    @property
    def failed(self) -> bool:
        """Whether any section failed."""
        return any(section.failures for section in self.sections)

    def write(self, folder: Path, stem: str) -> tuple[Path, Path]:
        """Write `stem`.json and `stem`.md into `folder`; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        found = {"environment": self.environment, "sections": list(map(asdict, self.sections))}
        as_json, as_page = folder / f"{stem}.json", folder / f"{stem}.md"
        as_json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        as_page.write_text(page(self.environment, self.sections, stem), encoding="utf-8")
        return as_json, as_page


def page(environment: dict[str, Any], sections: Sequence[Section], title: str) -> str:
    """The report as Markdown."""
    blocks = [f"# {title}", "\n".join(f"- {k}: {v}" for k, v in environment.items())]
    for section in sections:
        verdict = "failed" if section.failures else "passed"
        blocks.append(
            f"## {section.name}\n\n{verdict} in {section.seconds:.0f} of {section.budget:.0f} s"
        )
        blocks += [f"- {failure}" for failure in section.failures]
        for table in section.tables:
            rows = [table.header, ["---"] * len(table.header), *table.rows]
            lines = (f"| {' | '.join(map(_shown, row))} |" for row in rows)
            blocks.append(f"{table.title}\n\n" + "\n".join(lines))
    return "\n\n".join(blocks) + "\n"


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when it takes longer, and again every few seconds in case a
    library swallows it; a call that does not return to Python is interrupted when it does.
    """

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"out of its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _shown(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell)
