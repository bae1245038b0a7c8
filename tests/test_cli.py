"""The command line: its surface is frozen, and a mistake is one line and a non-zero exit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from rellax_ds.artifacts import STAGES
from rellax_ds.cli import app

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"--recipe", "--set", "--work-dir", "--resume"}


def rellax(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rellax_ds.cli", *arguments]
    return subprocess.run(command, cwd=cwd or ROOT, capture_output=True, text=True, check=False)


def test_command_line_surface_is_frozen() -> None:
    group = typer.main.get_command(app)
    surface = {
        name: {flag for parameter in command.params for flag in parameter.opts}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    expected = dict.fromkeys((*STAGES, "assets"), SHARED) | {"run": SHARED | {"--until"}}
    expected["shards"] = SHARED | {"action"}
    machines = {"--ranks", "--hosts", "--gpu-memory", "--tokens-per-second"}
    expected["plan"] = SHARED - {"--resume"} | machines | {"--json"}
    places = {"--only", "--parallel", "--ray", "--report-only"}
    expected["study"] = {"--study", "--set", "--work-dir"} | places
    assert surface == expected


def test_unknown_key_is_one_line_and_exit_1() -> None:
    result = rellax("tables", "--recipe", "ml100k_demo", "--set", "data.label_treshold=3")
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "data.label_treshold" in line
    assert "'data.label_threshold'" in line


def test_stage_without_its_input_names_the_command_to_run(tmp_path: Path) -> None:
    result = rellax("report", "--recipe", "ml100k_demo", "--work-dir", str(tmp_path / "work"))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "run `rellax" in line
    assert not (tmp_path / "work").exists()


def test_command_line_starts_without_heavy_imports() -> None:
    code = (
        "import sys, rellax_ds.cli; "
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
