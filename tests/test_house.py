"""The house rules a machine can check: floors, the kernels' name, the environment, sizes."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Floor of every room of rellax_ds; a module imports its own room and lower floors only.
FLOORS = {
    "errors": 0,
    "schema": 0,
    "section": 1,
    "family": 1,
    "plugin": 1,
    "crm_config": 1,
    "data_config": 1,
    "config": 1,
    "study": 1,
    "recipes": 1,
    "artifacts": 1,
    "partitions": 1,
    "redaction": 1,
    "runtime": 1,
    "metrics": 1,
    "blend": 1,
    "batch": 1,
    "assets": 1,
    "gguf": 1,
    "tables": 2,
    "ops": 2,
    "kernels": 2,
    "retrieval": 3,
    "crm": 3,
    "engine": 3,
    "prompts": 4,
    "model": 4,
    "shards": 5,
    "training": 6,
    "evaluation": 6,
    "planning": 6,
    "stages": 7,
    "cli": 8,
    "testing": 8,
    "made_logs": 8,
}
# F0 and F1 are words: their modules may import each other (runtime from config and so on).
WORDS = 1
# Siblings that do import each other, and why.
ALLOWED = {
    ("ops", "kernels"),  # ops is the one door to the kernels
    ("testing", "made_logs"),  # testing builds on the raw files of made_logs
}


def sources() -> list[Path]:
    library = [p for p in (ROOT / "rellax_ds").rglob("*.py") if "kernels" not in p.parts[-2:]]
    return sorted(
        {p.resolve() for p in library} | {p.resolve() for p in (ROOT / "kernels").glob("*.py")}
    )


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        return "kernels"
    return relative.parts[1].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Rooms of rellax_ds that a file imports, also inside functions and under TYPE_CHECKING."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("rellax_ds.")
            }
        elif isinstance(node, ast.ImportFrom) and node.module == "rellax_ds":
            rooms |= {alias.name for alias in node.names if alias.name in FLOORS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rellax_ds."):
            rooms.add(str(node.module).split(".")[1])
    return rooms


def test_floors_every_import_points_down() -> None:
    wrong = []
    for path in sources():
        room = room_of(path)
        if room == "__init__":
            continue
        for other in imports_of(path) - {room}:
            down = FLOORS[other] < FLOORS[room] or FLOORS[room] == FLOORS[other] <= WORDS
            if not down and (room, other) not in ALLOWED:
                wrong.append(
                    f"{path.relative_to(ROOT)} (F{FLOORS[room]}) imports {other} (F{FLOORS[other]})"
                )
    assert not wrong, "\n".join(wrong)


def test_floors_every_room_is_on_a_floor() -> None:
    rooms = {room_of(path) for path in sources()} - {"__init__"}
    assert rooms <= set(FLOORS), f"give these rooms a floor: {rooms - set(FLOORS)}"


def test_kernels_are_reached_through_the_package_only() -> None:
    assert (ROOT / "rellax_ds" / "kernels").is_symlink()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in ROOT.rglob("*.py"):
        if ".venv" in path.parts or "build" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert "kernels" not in {name.split(".")[0] for name in names}, path


def test_environment_is_read_in_runtime_only() -> None:
    readers = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}:
                readers.add(path.relative_to(ROOT).as_posix())
    assert readers <= {"rellax_ds/runtime.py"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_module_has_a_docstring_and_a_readable_length(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} says nothing about why it exists"
    assert text.count("\n") <= 600, f"{path} is over 600 lines"


def test_drawers_and_shortcuts_are_absent() -> None:
    forbidden = {"utils", "helpers", "manager", "common", "new", "v2", "misc"}
    assert not {p.stem for p in sources()} & forbidden
    calls = (
        "eval(",
        "exec(",
        "pickle.load",
        "yaml.load(",
        "shell=True",
        "torch.load(",
        "set_z3_leaf_modules",
    )
    for path in sources():
        tree = ast.parse(path.read_text())
        code = ast.unparse(tree)
        found = [call for call in calls if call in code.replace(".eval(", "")]
        assert not found, f"{path}: {found}"


def test_fixtures_hold_no_movielens_rows() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = tracked.stdout.split()
    assert not [
        n
        for n in names
        if n.endswith((".inter", ".item", ".user", ".data", ".dat", ".csv", ".tar"))
    ]
