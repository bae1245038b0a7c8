"""The wheel: only rellax_ds, with the kernels, the recipes and the templates, importable outside
the checkout.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("rellax_ds", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_contains_only_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"rellax_ds"}
    assert "rellax_ds/kernels/reference.py" in names
    assert "rellax_ds/recipes/ml100k_demo.yaml" in names
    assert "rellax_ds/planning/configs/Qwen--Qwen3-8B.json" in names
    assert any(name.startswith("rellax_ds/prompts/") and name.endswith(".yaml") for name in names)
    assert any(name.endswith(".j2") for name in names)


def test_wheel_unpacked_elsewhere_imports_kernels_by_their_full_name(
    wheel: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import rellax_ds.kernels.reference as r, rellax_ds.config as c, sys; "
        "assert 'kernels' not in sys.modules; print(r.__file__, len(c.shipped_recipes()))"
    )
    command = [sys.executable, "-P", "-c", code]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(str(tmp_path))
    assert int(result.stdout.split()[-1]) >= 2


def test_setup_without_the_kernels_link_stops_with_the_remedy(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "rellax_ds").mkdir()
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "ln -s ../kernels rellax_ds/kernels" in result.stderr
