"""Makes `import rellax_ds` enough for PEFT to know CFLoRA, without importing PEFT.

An adapter folder names its method, and PEFT knows only methods registered before it reads one. If
PEFT is loaded already the method is registered at once; if not, an import hook waits for PEFT, so a
program that never touches it pays nothing. The hook is the one place where a floor calls a higher
one, by name.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

METHOD = "rellax_ds.model.cflora"
"""Module whose import registers the method."""


def install() -> None:
    """Register the method now or when PEFT is imported; does nothing the second time."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _WaitForPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForPeft())


def _register() -> None:
    """Import the method; a program that only wanted PEFT goes on without it."""
    try:
        importlib.import_module(METHOD)
    except ImportError as error:
        warnings.warn(
            f"rellax_ds cannot register CFLORA with PEFT: {error}; reinstall rellax-ds",
            stacklevel=2,
        )


class _WaitForPeft(importlib.abc.MetaPathFinder):
    """Finds `peft` as everyone else would, once, and has the method registered after it is run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """PEFT's spec with our loader around its own; None for every other module."""
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    """Loads a module as its own loader would, then registers the method."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The module as its own loader makes it."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, put its own loader back and register the method."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
