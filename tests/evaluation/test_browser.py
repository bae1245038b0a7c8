"""The page as a person gets it: photographed by a headless browser that reaches no network."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest
from matplotlib.image import imread

from rellax_ds.evaluation import report
from rellax_ds.evaluation.findings import find

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.evaluation.findings import Evidence

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
WIDTH, HEIGHT = 1000, 7000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]


def browse(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a browser that reaches no network and knows no profile."""
    command = [
        *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--proxy-server=127.0.0.1:9", f"--user-data-dir={page.parent / 'profile'}"),
        *("--enable-logging=stderr", "--disable-dev-shm-usage", *flags, page.as_uri()),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture
def page(evidence: Evidence, folder: Path) -> Path:
    path = folder / "report.html"
    if not path.exists():
        report.write(find(evidence), folder)
    return path


def test_browser_draws_the_page_with_its_charts_in_both_themes(page: Path) -> None:
    pictures = []
    for theme, flags in (("light", ()), ("dark", ("--force-dark-mode",))):
        picture = page.with_name(f"{theme}.png")
        browse(page, f"--screenshot={picture}", f"--window-size={WIDTH},{HEIGHT}", *flags)
        pictures.append(imread(picture)[..., :3])
    light, dark = pictures
    assert light.shape == (HEIGHT, WIDTH, 3)
    assert light[5, 5].mean() > 0.9 > 0.3 > dark[5, 5].mean()
    for image in pictures:
        drawn = (np.abs(image - image[5, 5]) > 0.2).any(axis=2)
        assert drawn[:, : WIDTH // 8].mean() < 0.01, "something sticks out on the left"
        assert drawn[:, -WIDTH // 8 :].mean() < 0.01, "something sticks out on the right"
        rows = np.flatnonzero(drawn.any(axis=1))
        assert rows[0] < 150
        assert rows[-1] > 3000, "the page is cut off"


def test_browser_says_nothing_of_missing_parts(page: Path) -> None:
    found = browse(page, "--dump-dom", "--window-size=1000,800")
    assert "<h2>Stages</h2>" in found.stdout
    assert found.stdout.count("<svg") == 6
    for word in ("ERR_", "Refused", "Uncaught", "Failed to load"):
        assert word not in found.stderr, found.stderr
