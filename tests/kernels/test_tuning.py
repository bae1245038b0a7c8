"""Tuning: a choice is right, kept and read back, and nothing that goes wrong is an error."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from operator_cases import TWO_RUNS, case, error

pytest.importorskip("triton")

import triton

from rellax_ds.kernels import choices, configs, launch, tuning
from rellax_ds.kernels.choices import Choice, Key
from rellax_ds.kernels.rows import Rows

KEY = Key("Test GPU", 90, "3.0", "gemm", "", 8192, 4096, 4096, 16, 2)
PATH_KEY = replace(KEY, kernel=choices.PATH)
X = torch.ones(3)
ONE_SAMPLE = Rows.padded(1, 70)
Call = functools.partial[object]


class Launcher:
    """Stands for a kernel: refuses some configurations, and takes the milliseconds it was told."""

    def __init__(self, ms: Callable[[configs.Launch], float]) -> None:
        self.ms, self.now = ms, 0.0
        self.launched: list[configs.Launch] = []
        self.refused: Callable[[configs.Launch], bool] = lambda config: False
        self.wrong: Callable[[configs.Launch], bool] = lambda config: False

    def __call__(self, config: configs.Launch) -> torch.Tensor:
        self.launched.append(config)
        if self.refused(config):
            raise triton.OutOfResources(300_000, 232_448, "shared memory")
        self.now = self.ms(config)
        return X * (1.5 if self.wrong(config) else 1.0)

    def timer(self, call: Call) -> float:
        call()
        return self.now


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own and a process that knows nothing."""
    monkeypatch.setenv("RELLAX_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache" / "kernels" / "tuning.json"
    tuning.forget()


def candidates(key: Key = KEY) -> tuple[configs.Launch, ...]:
    return configs.candidates(key.kernel, key.architecture, key.itemsize, key.block_rank)


def fastest(wanted: configs.Launch) -> Launcher:
    return Launcher(lambda config: 1.0 if config == wanted else 2.0)


def chosen(key: Key, launcher: Launcher, **options) -> configs.Launch:
    with tuning.timing(timer=launcher.timer, **options):
        return tuning.choose(key, launcher)


def never(config: configs.Launch) -> object:
    raise AssertionError("a plain launch times nothing")


@pytest.mark.parametrize("architecture", [None, 70, 75, 80, 86, 89, 90, 100, 120, 999])
@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("block_rank", [16, 64])
def test_every_gpu_has_a_short_list_that_starts_with_its_default(
    architecture: int | None, kernel: str, itemsize: int, block_rank: int
) -> None:
    found = configs.candidates(kernel, architecture, itemsize, block_rank)
    assert found[0] == configs.launch(kernel, architecture, itemsize, block_rank)
    assert (4 if architecture and kernel != "grad_gate" else 2) <= len(found) <= 10
    assert len(set(found)) == len(found)
    assert all(configs.valid(kernel, config) for config in found)


@pytest.mark.parametrize("architecture", [75, 90, 120, 999])
def test_an_unknown_gpu_without_choices_takes_the_default(architecture: int) -> None:
    key = replace(KEY, architecture=architecture)
    expected = configs.launch(key.kernel, architecture, key.itemsize, key.block_rank)
    assert tuning.choose(key, never) == expected


def test_the_fastest_candidate_is_chosen_and_stays_chosen() -> None:
    wanted = candidates()[3]
    launcher = fastest(wanted)
    assert chosen(KEY, launcher) == wanted
    assert tuning.choose(KEY, never) == wanted
    before = len(launcher.launched)
    assert chosen(KEY, launcher) == wanted
    assert len(launcher.launched) == before
    other = replace(KEY, tokens=2 * KEY.tokens)
    assert tuning.choose(other, never) == candidates(other)[0]


def test_the_default_stays_unless_another_is_clearly_faster() -> None:
    launcher = Launcher(lambda config: 1.0 if config == candidates()[0] else 0.99)
    assert chosen(KEY, launcher) == candidates()[0]


@pytest.mark.parametrize("flaw", ["refused", "wrong"])
def test_a_candidate_that_fails_or_computes_something_else_is_left_out(flaw: str) -> None:
    best, second = candidates()[2], candidates()[4]
    launcher = Launcher(lambda config: {best: 1.0, second: 2.0}.get(config, 3.0))
    setattr(launcher, flaw, lambda config: config == best)
    with tuning.timing(timer=launcher.timer) as made:
        assert tuning.choose(KEY, launcher) == second
    (choice,) = made
    assert (choice.ms, choice.default_ms, choice.failed) == (2.0, 3.0, 1)


def test_where_every_candidate_fails_the_default_stays_and_is_not_kept(cache: Path) -> None:
    launcher = Launcher(lambda config: 1.0)
    launcher.refused = lambda config: True
    assert chosen(KEY, launcher) == candidates()[0]
    tried = len(launcher.launched)
    assert tried > 3
    assert chosen(KEY, launcher) == candidates()[0]
    assert len(launcher.launched) == tried
    assert not cache.exists()


def test_a_default_the_gpu_refuses_gives_way_to_one_that_runs() -> None:
    launcher = fastest(candidates()[5])
    launcher.refused = lambda config: config == candidates()[0]
    assert chosen(KEY, launcher) == candidates()[5]


@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_sums_are_cut_as_by_default_unless_reordering_is_allowed(kernel: str) -> None:
    key = replace(KEY, kernel=kernel)
    names = {"grad_up": ("BM", "BN"), "grad_a": ("BM", "BN"), "grad_gate": ("BM",)}

    def cuts(launcher: Launcher) -> set[tuple[int, ...]]:
        return {
            tuple(config.tile(name) for name in names.get(kernel, ("BK",)))
            for config in launcher.launched
        }

    careful, free = Launcher(lambda config: 1.0), Launcher(lambda config: 1.0)
    chosen(key, careful, save=False)
    tuning.forget()
    chosen(key, free, allow_reordering=True, save=False)
    assert len(cuts(careful)) == 1
    assert len(set(careful.launched)) > 1
    assert len(cuts(free)) > 1


def test_nothing_is_tried_after_the_time_is_up() -> None:
    launcher = fastest(candidates()[1])
    assert chosen(KEY, launcher, seconds=-1.0) == candidates()[0]
    assert launcher.launched == []


def test_an_alarm_of_the_caller_is_not_swallowed() -> None:
    def ring(call: Call) -> float:
        raise TimeoutError("out of time")

    with pytest.raises(TimeoutError), tuning.timing(timer=ring):
        tuning.choose(KEY, Launcher(lambda config: 1.0))
    assert tuning.choose(KEY, never) == candidates()[0]


def test_choices_survive_the_process_and_merge_with_others(cache: Path) -> None:
    wanted = candidates()[2]
    other_key = replace(KEY, gpu="Other GPU", architecture=80)
    choices.write([Choice(other_key, candidates(other_key)[1], 0.5, 0.7)])
    chosen(KEY, fastest(wanted))
    tuning.forget()
    assert tuning.choose(KEY, never) == wanted
    assert tuning.choose(other_key, never) == candidates(other_key)[1]
    for field, value in (("gpu", "Third GPU"), ("triton", "4.0"), ("d_in", 5120)):
        key = replace(KEY, **{field: value})
        assert tuning.choose(key, never) == candidates(key)[0]
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_choices_not_to_be_saved_stay_in_the_process(cache: Path) -> None:
    wanted = candidates()[2]
    assert chosen(KEY, fastest(wanted), save=False) == wanted
    assert tuning.choose(KEY, never) == wanted
    assert not cache.exists()


def entry(**changes: object) -> dict[str, object]:
    """One valid entry of the file, changed."""
    config = candidates()[1]
    tiles = [list(tile) for tile in config.tiles]
    launched = {"tiles": tiles, "num_warps": config.num_warps, "num_stages": config.num_stages}
    made = {"key": KEY.__dict__, "chosen": launched, "ms": 1.0, "default_ms": 2.0}
    return {**made, **changes}


def test_an_entry_as_the_tests_write_it_is_read(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({"format": choices.FORMAT, "choices": [entry()]}))
    assert tuning.choose(KEY, never) == candidates()[1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe not text",
        b"{",
        b"[" * 100_000,
        b"3",
        b"[]",
        b"{}",
        json.dumps({"format": choices.FORMAT + 1, "choices": [entry()]}).encode(),
        json.dumps({"format": choices.FORMAT, "choices": 3}).encode(),
    ],
    ids=["empty", "binary", "cut", "deep", "number", "list", "bare", "newer", "no-list"],
)
def test_a_file_that_is_not_ours_is_ignored_in_one_line_and_replaced(
    content: bytes, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="rellax_ds"):
        assert tuning.choose(KEY, never) == candidates()[0]
        assert tuning.choose(KEY, never) == candidates()[0]
    assert len(caplog.records) == 1
    wanted = candidates()[2]
    chosen(KEY, fastest(wanted))
    tuning.forget()
    assert tuning.choose(KEY, never) == wanted


@pytest.mark.parametrize(
    "foreign",
    [
        3,
        {},
        entry(ms="fast"),
        entry(chosen="cublas"),
        entry(chosen={"tiles": [["BM", 128]], "num_warps": 8, "num_stages": 3}),
        entry(chosen={**entry()["chosen"], "num_warps": 7}),
        entry(chosen={**entry()["chosen"], "tiles": [["BM", 100], ["BN", 128], ["BK", 64]]}),
        entry(key={**KEY.__dict__, "kernel": "unknown"}),
        entry(key={**KEY.__dict__, "tokens": "8192"}),
        entry(key={**KEY.__dict__, "more": 1}),
        entry(key=PATH_KEY.__dict__),
        entry(key=PATH_KEY.__dict__, chosen="unknown"),
    ],
)
def test_an_entry_that_is_not_ours_is_ignored_and_others_are_read(
    foreign: object, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = replace(KEY, tokens=16)
    cache.parent.mkdir(parents=True)
    content = {"format": choices.FORMAT, "choices": [foreign, entry(key=good.__dict__)]}
    cache.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, logger="rellax_ds"):
        assert tuning.choose(KEY, never) == candidates()[0]
    assert tuning.choose(good, never) == candidates()[1]
    assert len(caplog.records) == 1


def test_a_folder_that_cannot_be_written_costs_one_line_and_no_choice(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where the folder should be")
    wanted = candidates()[2]
    with caplog.at_level(logging.WARNING, logger="rellax_ds"):
        assert chosen(KEY, fastest(wanted)) == wanted
    assert "not kept" in caplog.messages[-1]
    assert tuning.choose(KEY, never) == wanted


def test_a_launch_takes_the_next_smaller_configuration_until_one_fits() -> None:
    like = torch.zeros(4, 8)
    default = configs.launch("grad_a", None, 4)
    launcher = Launcher(lambda config: 1.0)
    launcher.refused = lambda config: config.tile("BN") > 32
    tuning.launched("grad_a", like, 16, (4, 8, 0), launcher)
    assert launcher.launched[0] == default
    assert launcher.launched[-1] == default.with_(BN=32)
    launcher.refused = lambda config: True
    with pytest.raises(triton.OutOfResources):
        tuning.launched("grad_a", like, 16, (4, 8, 0), launcher)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_the_way_down_drops_stages_first_and_stays_valid(kernel: str, architecture: int) -> None:
    config: configs.Launch | None = configs.launch(kernel, architecture, 2)
    seen = []
    while config is not None:
        assert configs.valid(kernel, config)
        seen.append(config)
        config = configs.smaller(config)
    stages = [config.num_stages for config in seen]
    assert stages == sorted(stages, reverse=True)
    assert seen[stages.index(1)].tiles == seen[0].tiles
    assert max(size for name, size in seen[-1].tiles if name != "GROUP") <= 32


@pytest.mark.parametrize("index", [1, 2])
def test_the_operator_is_right_with_other_configurations(index: int) -> None:
    """The timer likes the candidate at one place of every list, so that one is launched at last."""
    liked = {
        config
        for kernel in configs.KERNELS
        for config in configs.candidates(kernel, None, 4)[index : index + 1]
    }

    def timer(call: Call) -> float:
        return 1.0 if call.args[0] in liked else 2.0

    operator = case(TWO_RUNS, d_in=70, p=0.2)
    exact_ys, exact = operator.run("reference", torch.float64)
    with tuning.timing(timer=timer, allow_reordering=True) as made:
        (y,), gradients = operator.run("triton", torch.float32)
    assert {"down", "gemm"} <= {choice.key.kernel for choice in made if choice.chosen in liked}
    assert error(y, exact_ys[0]) < 1e-5
    for name, gradient in gradients.items():
        assert error(gradient, exact[name]) < 1e-5, name


@pytest.mark.parametrize("kernel", ["gemm", "down"])
def test_a_kernel_gives_the_right_result_with_each_candidate(kernel: str) -> None:
    torch.manual_seed(0)
    sizes = ((70, 50), (90, 50), (70, 5), (90, 5), (5, 50))
    x, W, S, B, A = (torch.randn(size) for size in sizes)
    options = configs.candidates(kernel, None, 4)
    used = set()
    for wanted in options:
        tuning.forget()

        def timer(call: Call, wanted: configs.Launch = wanted) -> float:
            return 1.0 if call.args == (wanted,) else 2.0

        with tuning.timing(timer=timer, allow_reordering=True) as made:
            if kernel == "gemm":
                found, exact = launch.gemm_up(x, W, None, S, B), x @ W.T + S @ B.T
            else:
                path = launch.TritonPath()
                (found,), _, _ = path.down(x, (A,), (None,), ONE_SAMPLE, (1.0,), None, False)
                exact = x @ A.T
        assert error(found, exact.double()) < 1e-5
        (choice,) = made
        assert choice.failed == 0
        used.add(choice.chosen)
    assert used == set(options)


def test_timing_does_not_touch_what_a_launch_accumulates_on() -> None:
    torch.manual_seed(0)
    dH, A, out = torch.randn(20, 5), torch.randn(5, 40), torch.randn(20, 40)
    expected = out + dH @ A

    def timer(call: Call) -> float:
        call()
        return 1.0

    with tuning.timing(timer=timer) as made:
        found = launch.gemm_down(None, dH, A, None, None, out=out)
    assert found is out
    assert len(made) == 1
    torch.testing.assert_close(out, expected)


def test_the_interpreter_times_nothing_without_a_timer_and_keeps_nothing(cache: Path) -> None:
    with tuning.timing() as made:
        launch.gemm_up(*(torch.ones(16, 16) for _ in range(2)), None, *[torch.ones(16, 4)] * 2)
    assert made == []
    assert tuning.tune([tuning.Shape(16, 16, 16, 4)]) == []
    with tuning.timing(timer=lambda call: 1.0) as made:
        launch.gemm_up(*(torch.ones(16, 16) for _ in range(2)), None, *[torch.ones(16, 4)] * 2)
    assert len(made) == 1
    assert not cache.exists()


def tuned(ms: dict[str, float]) -> list[Choice]:
    """Choices for one small layer by a timer that knows the compute paths only."""

    def timer(call: Call) -> float:
        (option,) = call.args
        return ms[option] if isinstance(option, str) else 1.0

    shape = tuning.Shape(10, 24, 40, 5, samples=3)
    return tuning.tune([shape], dtype=torch.float32, device="cpu", timer=timer)


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        ({"triton": 1.0, "cublas": 2.0}, "triton"),
        ({"triton": 2.0, "cublas": 1.0}, "cublas"),
        ({"triton": 1.0, "cublas": 0.99}, "triton"),
    ],
)
def test_tuning_a_layer_covers_every_kernel_and_the_path(
    ms: dict[str, float], expected: str
) -> None:
    made = tuned(ms)
    assert {choice.key.kernel for choice in made} == {*configs.KERNELS, choices.PATH}
    assert all(choice.failed == 0 and choice.ms for choice in made)
    (path,) = [choice for choice in made if choice.key.kernel == choices.PATH]
    assert path.chosen == expected
    x = torch.zeros(2, 5, 24)
    assert tuning.preferred(x, 40, 5) == "triton"
    with tuning.timing(timer=lambda call: 1.0):
        assert tuning.preferred(x, 40, 5) == expected
        assert tuning.preferred(x, 41, 5) == "triton"


def test_a_path_on_disk_is_read_back(cache: Path) -> None:
    choices.write([Choice(PATH_KEY, "cublas", 1.0, 2.0)])
    (found,) = choices.read()
    assert found == Choice(PATH_KEY, "cublas", 1.0, 2.0)


def test_a_shape_no_kernel_can_compute_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    shapes = [tuning.Shape(10, 24, 40, 5, samples=0), tuning.Shape(10, 24, 40, 5)]
    with caplog.at_level(logging.WARNING, logger="rellax_ds"):
        made = tuning.tune(
            shapes, dtype=torch.float32, device="cpu", dropout_p=0.0, timer=lambda call: 1.0
        )
    assert len(caplog.records) == 1
    assert {choice.key.kernel for choice in made} >= {"down", "gemm", "grad_a", choices.PATH}
