"""What `ray job submit --working-dir .` uploads: the code, and not the folders beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The tracked and new files of this checkout, and what a used one has beside them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = tmp_path / "checkout"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    for place in (".git/objects", ".venv/lib", "work/run/1_tables", "rellax_ds/__pycache__"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "large").write_bytes(os.urandom(6 * MIB))
    return folder


@pytest.mark.ray
def test_upload_of_a_used_checkout_is_small_and_complete(checkout: Path, tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True, excludes=[])
    assert package.stat().st_size < 5 * MIB
    names = set(zipfile.ZipFile(package).namelist())
    found = [name for name in names if name.endswith("large") or name.startswith(".git/")]
    assert not found
    needed = {"ray_jobs/pipeline.py", "ray_jobs/driver.py", "rellax_ds/recipes/ml100k_demo.yaml"}
    assert needed <= names
    assert any(name.startswith("rellax_ds/kernels/") for name in names)
