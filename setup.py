"""Packages of the wheel: `rellax_ds` and the kernels, which live in `kernels/` at the root of the
checkout.

The kernels are reached as `rellax_ds.kernels` through a committed symlink, because the bare name
`kernels` belongs to another distribution. Everything else about the package is in pyproject.toml.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

if not (ROOT / "rellax_ds" / "kernels" / "reference.py").is_file():
    sys.exit(
        "setup.py: rellax_ds/kernels does not lead to kernels/ (unpacked without symlinks?); "
        "run: rm -rf rellax_ds/kernels && ln -s ../kernels rellax_ds/kernels"
    )

setup(
    packages=[*find_packages(include=["rellax_ds", "rellax_ds.*"]), "rellax_ds.kernels"],
    package_data={
        "rellax_ds": [
            *("recipes/*.yaml", "recipes/studies/*.yaml"),
            *("prompts/*.yaml", "planning/configs/*.json"),
            *("evaluation/*.j2", "py.typed"),
        ],
    },
)
