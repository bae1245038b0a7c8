"""The main job as a newcomer runs it: a fresh clone, an empty home folder, `make demo`, a report.

The gate: at least 1,000 test rows scored, every baseline in the report, and a second `make demo`
that skips all eight stages. Figures end the output, one a line: FIGURE name value.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Report, parser
from rellax_ds.artifacts import STAGES

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_ROWS = 1000


def main() -> int:
    """Run the job and print its figures; 1 when the gate fails."""
    arguments = parser(__doc__)
    arguments.add_argument("--recipe", default="ml100k_demo")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="rellax-main-job-") as folder:
        clone, home = Path(folder) / "clone", Path(folder) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        first, _ = demo(clone, home, options.recipe)
        second, output = demo(clone, home, options.recipe)
        report = json.loads(
            (clone / "work" / options.recipe / "8_report" / "report.json").read_text()
        )
        commit = git(clone, "rev-parse", "HEAD")
    page = Report(options.recipe, failures=gate(report, output))
    figures = figures_of(report) | {"minutes": first / 60, "again_seconds": second}
    page.figures = {f"{options.recipe}_{name}": value for name, value in figures.items()}
    page.table(["stage", "seconds"], [[s["stage"], float(s["seconds"])] for s in report["stages"]])
    said = (*report["statements"]["protocol"], *report["statements"]["result"])
    page.body.append("\n".join(f"- {line}" for line in said))
    return page.finish(options.report, commit)


def demo(clone: Path, home: Path, recipe: str) -> tuple[float, str]:
    """Seconds and output of one `make demo` in `clone`, with `home` for caches."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RELLAX", "RAY_"))}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    start = time.monotonic()
    done = subprocess.run(
        ["make", "demo", f"RECIPE={recipe}"],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"make demo failed:\n{done.stdout[-4000:]}")
    return time.monotonic() - start, done.stdout


def result(report: dict[str, Any], model: str) -> dict[str, Any]:
    """The report's test row of a model."""
    rows = [r for r in report["results"] if (r["model"], r["split"]) == (model, "test")]
    row: dict[str, Any] = rows[0]
    return row


def gate(report: dict[str, Any], again: str) -> list[str]:
    """What is wrong with the run; empty when nothing is."""
    failures = []
    rows = result(report, "rellax")["n"]
    if rows < MINIMUM_ROWS:
        failures.append(f"{rows} test rows scored, {MINIMUM_ROWS} are needed")
    missing = {"rellax", "crm", "logistic", "last_labels"} - set(report["models"])
    if missing:
        failures.append(f"the report lacks {', '.join(sorted(missing))}")
    if again.count("up to date") != len(STAGES):
        failures.append("a second make demo did not skip all eight stages")
    return failures


def figures_of(report: dict[str, Any]) -> dict[str, float]:
    """AUC of every model on the scored test rows, and the interval of ours."""
    ours = result(report, "rellax")
    figures = {"test_rows": ours["n"], "test_auc": ours["auc"]["value"]}
    figures |= {"test_auc_low": ours["auc"]["low"], "test_auc_high": ours["auc"]["high"]}
    for model in ("crm", "logistic", "last_labels"):
        figures[f"{model}_test_auc"] = result(report, model)["auc"]["value"]
    return figures


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command in `folder`."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
