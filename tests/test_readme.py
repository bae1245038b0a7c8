"""The README's promises: every command in it exists, every path in its tree is there, its recipes
load.
"""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from rellax_ds.cli import app
from rellax_ds.config import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "ray_jobs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                text = line.split("  #")[0].strip()
                if text.startswith(("make ", "rellax ", "deepspeed ", "python ", "ray ")):
                    found.append(text)
    return sorted(set(found))


def check_flags(arguments: list[str], subcommand: str) -> None:
    command = typer.main.get_command(app).commands[subcommand]  # type: ignore[attr-defined]
    known = {flag for parameter in command.params for flag in parameter.opts}
    flags = {a for a in arguments if a.startswith("--")}
    assert flags <= known, f"{flags - known} are not flags of rellax {subcommand}"
    if "--recipe" in arguments:
        recipe = arguments[arguments.index("--recipe") + 1]
        overrides = [b for a, b in pairwise(arguments) if a == "--set"]
        if not recipe.endswith(".yaml"):
            load_recipe(recipe, overrides)


@pytest.mark.parametrize("command", commands())
def test_documented_command_exists_with_its_flags(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "ray" and "--" in words:
        words = words[words.index("--") + 1 :]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "rellax":
        check_flags(words[2:], words[1])
    elif words[0] in {"python", "deepspeed"}:
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file()
        named = {"train.py": "train", "ray_jobs/pipeline.py": "run", "ray_jobs/study.py": "study"}
        subcommand = named.get(script)
        subcommand = subcommand or Path(script).stem.split("_", 1)[1]
        check_flags(words[words.index(script) + 1 :], subcommand)
    else:
        assert words[:2] in (["ray", "start"], ["ray", "stop"])


def test_tree_in_the_readme_is_the_tree_on_disk() -> None:
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"## The tree\n\n```\n(.*?)```", text, re.DOTALL)
    assert tree
    names = [
        line.split()[0] for line in tree.group(1).splitlines() if line and not line.startswith(" ")
    ]
    assert len(names) > 10
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_links_in_the_documentation_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
