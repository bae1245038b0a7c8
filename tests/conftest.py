"""Every test runs under the guards an entry point puts up, before any library reads them.

Triton's kernels are interpreted on the CPU; what compiles them for a GPU runs in a process of its
own. Several pytest workers share the files out: tests that start several processes, and those that
start Ray, stay with one worker each and begin first, because they take longest.
"""

from __future__ import annotations

import os

import pytest

from rellax_ds import runtime

runtime.guard_environment()
os.environ["TRITON_INTERPRET"] = "1"

SHARED = ("distributed", "ray")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    kinds = {
        item.path: mark
        for mark in reversed(SHARED)
        for item in items
        if item.get_closest_marker(mark)
    }
    for item in items:
        item.add_marker(pytest.mark.xdist_group(kinds.get(item.path, str(item.path))))
    ranks = {mark: rank for rank, mark in enumerate(SHARED)}
    items.sort(key=lambda item: ranks.get(kinds.get(item.path, ""), len(ranks)))
