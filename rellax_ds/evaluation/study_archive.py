"""A study's scores in one small file, to commit or to send: its figures without its runs.

It holds logits by sample id, the plan, and what the pages say of each run, but no row of the data
set: users, items and labels come from the tables, which anyone with the data set can build. A
digest says whether they are the same tables.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rellax_ds.artifacts import write_bytes
from rellax_ds.errors import ArtifactError, TableError
from rellax_ds.evaluation.study_runs import Rows, Scored, StudyRuns
from rellax_ds.schema import SAMPLES, SPLITS, check_table
from rellax_ds.study import PLAN, read_plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rellax_ds.artifacts import WorkDir

RUNS = "runs.json"
SCORES = "scores.parquet"

_VALID, _TEST = SPLITS.index("valid"), SPLITS.index("test")
_SCHEMA = pa.schema(
    {
        "run": pa.int16(),
        "split": pa.int8(),
        "sample": pa.int64(),
        "logit": pa.float32(),
        "crm": pa.float32(),
    }
)
_NOT_KEPT = {"run", "work", "test", "valid"}


def pack(root: Path, path: Path) -> None:
    """Write the archive of a study's finished runs; the same runs give the same bytes.

    Args:
        root: The study's folder.
        path: The file.

    Raises:
        ArtifactError, TableError: As `StudyRuns.read`.
    """
    study = StudyRuns.read(root)
    plan = (root / PLAN).read_text(encoding="utf-8").replace(f"{root.resolve()}/", "")
    kept = [part.name for part in fields(Scored) if part.name not in _NOT_KEPT]
    runs = {
        "rows": _digest(rows for one in study.scored for rows in (one.valid, one.test)),
        "reads": study.reads,
        "runs": [{"name": s.run.name} | {n: getattr(s, n) for n in kept} for s in study.scored],
    }
    parts = [
        {
            "run": np.full(rows.sample.size, number),
            "split": np.full(rows.sample.size, split),
            "sample": rows.sample,
            "logit": rows.logit,
            "crm": rows.crm,
        }
        for number, one in enumerate(study.scored)
        for split, rows in ((_VALID, one.valid), (_TEST, one.test))
    ]
    columns = [
        pa.array(np.concatenate([part[field.name] for part in parts])).cast(field.type, safe=False)
        for field in _SCHEMA
    ]
    scores = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), scores, compression="zstd")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (
            (PLAN, plan.encode()),
            (RUNS, json.dumps(runs, sort_keys=True).encode()),
            (SCORES, scores.getvalue()),
        ):
            entry = zipfile.ZipInfo(name)  # dated 1980, whenever it is written
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, packed.getvalue())


def plan_of(path: Path) -> Any:
    """Plan and runs of an archive, as `study.read_plan` gives them.

    Raises:
        ArtifactError: The file is absent or no archive of a study.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, PLAN).write_bytes(_member(path, PLAN))
        return read_plan(Path(folder))


def read(path: Path, work: WorkDir) -> StudyRuns:
    """The study of an archive, on tables and retrieved lists that have been built again.

    Args:
        path: The archive.
        work: Work folder with stages 1 to 3 of the study's recipes.

    Raises:
        ArtifactError: The file is no archive of a study.
        TableError: The tables are not those that were scored.
    """
    plan, planned = plan_of(path)
    try:
        document = json.loads(_member(path, RUNS))
        scores = check_table(
            pq.read_table(io.BytesIO(_member(path, SCORES))),
            {field.name: field.type for field in _SCHEMA},
            str(path),
        )
        by_name = {run.name: run for run in planned}
        runs = [(by_name[entry.pop("name")], entry) for entry in document["runs"]]
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: no archive of a study ({error!r}); pack it again") from None
    tables = work.stage_dir("tables") / "samples.parquet"
    samples = check_table(pq.read_table(tables), SAMPLES, str(tables))
    columns = {name: scores[name].to_numpy() for name in _SCHEMA.names}
    scored = []
    for number, (run, kept) in enumerate(runs):
        valid, test = (
            _rows(columns, (columns["run"] == number) & (columns["split"] == split), samples)
            for split in (_VALID, _TEST)
        )
        scored.append(Scored(run=run, work=work, valid=valid, test=test, **kept))
    if _digest(rows for one in scored for rows in (one.valid, one.test)) != document["rows"]:
        raise TableError(f"{path}: scores of other rows than {tables} has; check the data set")
    return StudyRuns(plan, planned, scored, document["reads"])


def _rows(columns: dict[str, Any], chosen: Any, samples: pa.Table) -> Rows:
    ids = columns["sample"][chosen]
    if ids.size and ids.max() >= samples.num_rows:
        raise TableError(f"sample {ids.max()} is scored, the tables have {samples.num_rows}")

    def of(name: str) -> Any:
        return samples[name].to_numpy()[ids].astype(np.int64)

    return Rows(
        ids,
        of("user"),
        of("label"),
        columns["logit"][chosen].astype(np.float64),
        columns["crm"][chosen].astype(np.float64),
        of("history_end") - of("history_start"),
    )


def _digest(parts: Iterable[Rows]) -> str:
    """Of what the tables say about the scored rows."""
    found = hashlib.sha256()
    for rows in parts:
        for column in (rows.sample, rows.user, rows.label, rows.history):
            found.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
    return found.hexdigest()


def _member(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path}: no archive of a study ({error}); pack it again") from None
