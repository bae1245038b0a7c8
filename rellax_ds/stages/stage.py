"""Stage: what every stage declares, and how one runs.

A stage module holds one `STAGE` and its `build` function. Declaring the recipe sections and input
stages here, and nowhere else, is what makes skipping safe: a section a stage reads without
declaring would be a stale artefact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rellax_ds import runtime
from rellax_ds.artifacts import out_of_space

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rellax_ds.artifacts import Manifest, WorkDir
    from rellax_ds.config import Recipe


@dataclass(frozen=True)
class StageContext:
    """What a build function works with.

    Attributes:
        recipe: The whole recipe; read only the declared sections.
        work: The run's folder.
        directory: Running folder to write into; published by rename after the build returns.
        key: Digest of everything the output depends on; pass it to `run_partitions`.
    """

    recipe: Recipe
    work: WorkDir
    directory: Path
    key: str

    def input(self, stage: str) -> Path:
        """Folder of a committed input stage."""
        return self.work.stage_dir(stage)


@dataclass(frozen=True)
class Stage:
    """Declaration of one stage.

    Attributes:
        name: One of `artifacts.STAGES`.
        version: Raised when the code changes what it writes.
        sections: Dotted recipe keys the build reads.
        inputs: Stages whose artefacts it reads, given the recipe.
        build: Writes the artefact's files into the context's directory and returns counts for the
            manifest.
        identities: Further parts of the key, for example the digest of a raw file.
    """

    name: str
    version: int
    sections: tuple[str, ...]
    inputs: Callable[[Recipe], tuple[str, ...]]
    build: Callable[[StageContext], dict[str, Any]]
    identities: Callable[[Recipe], dict[str, str]] = lambda _recipe: {}

    def parts(self, recipe: Recipe, work: WorkDir) -> dict[str, str]:
        """Everything the stage's output depends on, as name to digest."""
        parts = {"code": str(self.version)}
        parts |= {
            f"recipe {key}": value for key, value in recipe.section_digest(*self.sections).items()
        }
        parts |= {f"input {stage}": work.require(stage).content for stage in self.inputs(recipe)}
        parts |= self.identities(recipe)
        return parts

    def run(self, recipe: Recipe, work: WorkDir) -> Manifest:
        """Run the stage unless its committed artefact still matches; says which of the two, and
        why.
        """
        attempt = work.open(self.name, self.parts(recipe, work), recipe.model_dump(mode="json"))
        manifest = attempt.committed()
        if manifest is not None:
            runtime.logger.info(
                "%s: up to date (%s), skipped", self.name, work.stage_dir(self.name)
            )
            return manifest
        changes = attempt.changes()
        if changes:
            runtime.logger.info("%s: runs again because %s changed", self.name, ", ".join(changes))
        for stage in self.inputs(recipe):
            work.check(stage)
        directory = attempt.begin()
        try:
            with attempt.alone():
                manifest = attempt.committed()  # by whoever worked here before us
                if manifest is None:
                    counts = self.build(StageContext(recipe, work, directory, attempt.key))
                    manifest = attempt.commit(counts)
        except OSError as error:
            raise out_of_space(error, directory) or error from None
        runtime.logger.info(
            "%s: committed %s in %.1f s", self.name, work.stage_dir(self.name), manifest.seconds
        )
        return manifest
