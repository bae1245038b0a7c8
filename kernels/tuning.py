"""Timed launch configurations of the Triton kernels, kept on disk; without them the table's.

Nothing is timed unless asked: `tune` times given shapes, and within `timing` every launch times
what it has no choice for yet. A plain launch only looks its configuration up, in this process and
in one file of the cache folder, and takes the default of `kernels.configs` where there is none.
Under Triton's interpreter plain launches always take the default.

A changed configuration may change the last bits of a result: sums are cut differently with
`allow_reordering`, and different instructions may round differently without it. A tuned run
therefore repeats to the bit with the same file only, and since choices belong to a range of batch
sizes, so do a sample's last bits. Where that matters, keep the file beside the run or remove it
from the folder. Ranks that tune for themselves may choose differently; tune before launching them.

Nothing here fails for want of something: a candidate that does not compile, does not fit the GPU or
computes something else is left out, and a file that cannot be read or written costs a line in the
log.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from rellax_ds import runtime
from rellax_ds.kernels import choices, configs
from rellax_ds.kernels.choices import PATHS, Choice, Key
from rellax_ds.kernels.function import Call, CFLora
from rellax_ds.kernels.philox import Dropout, threshold_of
from rellax_ds.kernels.rows import Rows

Timer = Callable[["functools.partial[object]"], float]
"""Milliseconds of a call, whose one argument is the configuration or the compute path it runs."""

_MARGIN = 0.98
_DISAGREEMENT = 0.02
_T = TypeVar("_T")


@dataclass(frozen=True)
class Shape:
    """A layer to tune for: T rows in equal samples, widths and rank."""

    tokens: int
    d_in: int
    d_out: int
    rank: int
    samples: int = 1


@dataclass
class _Session:
    """A block in which launches are timed."""

    timer: Timer
    allow_reordering: bool
    deadline: float
    choices: list[Choice] = field(default_factory=list)

    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def note(self, choice: Choice) -> None:
        if choice not in self.choices:
            self.choices.append(choice)


@dataclass
class _Race(Generic[_T]):
    """Options timed against the first of them, which is kept unless another is clearly faster."""

    options: Sequence[_T]
    failed: int = 0
    times: dict[int, float] = field(default_factory=dict)

    def run(self, session: _Session, call: Callable[[_T], object]) -> _Race[_T]:
        expected: object = None
        for index, option in enumerate(self.options):
            if self.times and session.over():
                break
            try:
                found = call(option)
                if self.times and not _agree(found, expected):
                    raise ValueError("another result than the default's")
                took = session.timer(functools.partial(call, option))
            except TimeoutError:  # the caller's alarm
                raise
            except Exception as error:  # any error of a compiler, a driver or a library
                runtime.logger.debug("kernel tuning leaves out %s: %s", option, choices.line(error))
                self.failed += 1
                continue
            expected = found if expected is None else expected
            self.times[index] = took
        return self

    def choice(self, key: Key, named: Callable[[_T], configs.Launch | str]) -> Choice:
        first = self.times.get(0)
        best = min(self.times, key=self.times.__getitem__, default=0)
        if first is not None and self.times[best] > _MARGIN * first:
            best = 0
        tried = len(self.times) + self.failed
        chosen = named(self.options[best])
        return Choice(key, chosen, self.times.get(best), first, tried, self.failed)


_lock = threading.RLock()
_session: _Session | None = None
_known: dict[Key, Choice] | None = None


def launched(
    kernel: str,
    like: torch.Tensor,
    block_rank: int,
    sizes: tuple[int, int, int],
    call: Callable[[configs.Launch], _T],
    trial: Callable[[configs.Launch], object] | None = None,
    **form: int,
) -> _T:
    """Launch a kernel with the configuration chosen for it, or with the next smaller one as long as
    the GPU lacks the resources.

    Args:
        kernel: One of `configs.KERNELS`.
        like: A tensor on the device and of the type.
        block_rank: Registers a rank takes, a power of two.
        sizes: T, d_in and d_out; 0 where the kernel has none.
        call: Launches with a configuration.
        trial: The same for timing, where `call` changes a tensor it was given.
        **form: What else the launch compiles in.

    Returns:
        What `call` returns.

    Raises:
        triton.OutOfResources: Not even the smallest configuration fits.
    """
    said = " ".join(f"{name}={int(value)}" for name, value in form.items() if value)
    key = Key.of(kernel, like, sizes, block_rank, said)
    config = choose(key, trial or call)
    while True:
        try:
            return call(config)
        except importlib.import_module("triton").OutOfResources:
            smaller = configs.smaller(config)
            if smaller is None:
                raise
            config = smaller
            remember(key, config)


def choose(key: Key, call: Callable[[configs.Launch], object]) -> configs.Launch:
    """Configuration of a launch: the one chosen before, or timed now within `timing`, or the
    default.

    Args:
        key: The launch.
        call: Launches with a configuration and returns the outputs, tensors of its own; called
            within `timing` only.
    """
    default = configs.launch(key.kernel, key.architecture, key.itemsize, key.block_rank)
    session = _session
    if session is None and key.architecture is None:
        return default
    found = _choices(key).get(key)
    if session is not None and not _capturing():
        found = _timed(session, key, default, call)
    return found.chosen if found and isinstance(found.chosen, configs.Launch) else default


def remember(key: Key, config: configs.Launch) -> None:
    """Launch with this configuration for the rest of the process, in place of one the GPU lacks the
    resources for; nothing is written to disk.
    """
    with _lock:
        _choices(key)[key] = Choice(key, config)


def preferred(x: torch.Tensor, d_out: int, rank: int) -> str:
    """The faster of `PATHS` for a layer, where it was timed, else the default.

    Args:
        x: Input [..., d_in].
        d_out: Width of the output.
        rank: r.
    """
    key = _path_key(x, d_out, rank)
    if _session is None and key.architecture is None:
        return PATHS[0]
    found = _choices(key).get(key)
    return found.chosen if found and isinstance(found.chosen, str) else PATHS[0]


def forget() -> None:
    """Drop what this process knows; the next launch reads the file again."""
    global _known
    with _lock:
        _known = None


@contextlib.contextmanager
def timing(
    *,
    allow_reordering: bool = False,
    save: bool = True,
    seconds: float | None = None,
    timer: Timer | None = None,
) -> Iterator[list[Choice]]:
    """Within the block, the first launch of every key times its candidates on its own tensors.

    Args:
        allow_reordering: Also try candidates that cut sums differently than the default.
        save: Write the choices to the file at the end of the block; never done for the interpreter.
        seconds: Time after which nothing more is tried.
        timer: Milliseconds of a call; by default Triton's, a median with a cold L2 cache. Needed
            under the interpreter, where the block does nothing without one.

    Yields:
        The choices, filled as they are met.
    """
    global _session
    if timer is None and _interpreted():
        yield []
        return
    deadline = float("inf") if seconds is None else time.monotonic() + seconds
    before, session = _session, _Session(timer or _bench, allow_reordering, deadline)
    _session = session
    try:
        yield session.choices
    finally:
        _session = before
        if save:
            choices.write([c for c in session.choices if c.key.architecture and c.ms is not None])


def tune(
    shapes: Sequence[Shape],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    dropout_p: float = 0.05,
    trains_factors: bool = True,
    allow_reordering: bool = False,
    save: bool = True,
    seconds: float | None = None,
    timer: Timer | None = None,
) -> list[Choice]:
    """Time the kernels and the compute paths for layers, on random tensors; see `timing`.

    Args:
        shapes: The layers, the most important first.
        dtype: Type of x and the factors.
        device: Where.
        dropout_p: Drop rate on the input of A.
        trains_factors: Whether A and B get gradients, besides x and the gates.
        allow_reordering: See `timing`.
        save: See `timing`.
        seconds: See `timing`; the choices made by then are kept.
        timer: See `timing`.

    Returns:
        What was chosen; empty where the kernels cannot be timed. A shape that fails, for example
        for want of memory, is left out with a line in the log.
    """
    reason = _unavailable(timer)
    if reason:
        runtime.logger.info("kernel tuning: nothing to do, %s", reason)
        return []
    with timing(allow_reordering=allow_reordering, save=save, seconds=seconds, timer=timer) as made:
        for shape in shapes:
            try:
                _tune_layer(shape, dtype, torch.device(device), dropout_p, trains_factors)
            except TimeoutError:  # the caller's alarm
                raise
            except Exception as error:  # whatever the GPU or a library has against this shape
                runtime.logger.warning(
                    "kernel tuning leaves out %s: %s", shape, choices.line(error)
                )
    return made


def _tune_layer(
    shape: Shape, dtype: torch.dtype, device: torch.device, p: float, trains_factors: bool
) -> None:
    session = _session
    if session is None or session.over():
        return
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, kind: torch.dtype = dtype, trained: bool = False) -> torch.Tensor:
        made = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
        return made.div_(size[-1] ** 0.5).to(kind).requires_grad_(trained)

    x = draw(shape.tokens, shape.d_in, trained=True)
    weight = draw(shape.d_out, shape.d_in)
    A = draw(shape.rank, shape.d_in, trained=trains_factors)
    B = draw(shape.d_out, shape.rank, trained=trains_factors)
    G = draw(shape.samples, shape.rank, shape.rank, kind=torch.float32, trained=True)
    upstream = draw(shape.tokens, shape.d_out)
    wanted = [t for t in (x, A, B, G) if t.requires_grad]
    ends = [shape.tokens * s // shape.samples for s in range(shape.samples + 1)]
    rows = Rows.from_lengths([end - start for start, end in itertools.pairwise(ends)])
    threshold = threshold_of(p)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    dropout = Dropout(seed, threshold, (0,)) if threshold else None
    launch = importlib.import_module("rellax_ds.kernels.launch")
    paths = {"triton": launch.TritonPath(), "cublas": launch.CublasPath()}

    def step(name: str) -> tuple[torch.Tensor, ...]:
        call = Call(paths[name], rows, (1.0,), dropout, True)
        (y,) = CFLora.apply(call, x, weight, None, A, B, G)  # type: ignore[no-untyped-call]
        return (y.detach(), *torch.autograd.grad(y, wanted, upstream))

    for name in PATHS:
        step(name)
    key = _path_key(x, shape.d_out, shape.rank)
    if key in _choices(key):
        session.note(_choices(key)[key])
    elif not session.over():  # without the lock, since a backward pass launches in its own thread
        _record(session, _Race(PATHS).run(session, step).choice(key, str))


def _timed(
    session: _Session,
    key: Key,
    default: configs.Launch,
    call: Callable[[configs.Launch], object],
) -> Choice | None:
    """The choice of a key; made now unless there is one."""
    with _lock:
        found = _choices(key).get(key)
        if found is not None:
            session.note(found)
            return found
        if session.over():
            return None
        options = [
            config
            for config in configs.candidates(
                key.kernel, key.architecture, key.itemsize, key.block_rank
            )
            if session.allow_reordering or not configs.reorders(key.kernel, default, config)
        ]
        race = _Race(options).run(session, call)
        return _record(session, race.choice(key, lambda config: config))


def _record(session: _Session, choice: Choice) -> Choice:
    _choices(choice.key)[choice.key] = choice
    session.note(choice)
    return choice


def _choices(key: Key) -> dict[Key, Choice]:
    """All choices by key; the file is read when the first of a process is asked for."""
    global _known
    known = _known
    if known is None:
        with _lock:
            if _known is None:
                found = [] if key.architecture is None else choices.read()
                _known = {choice.key: choice for choice in found}
                ours = sum((k.gpu, k.triton) == (key.gpu, key.triton) for k in _known)
                if found:
                    runtime.logger.info(
                        "kernel tuning: %d of %d choices on disk are for %s and Triton %s",
                        *(ours, len(found), key.gpu, key.triton),
                    )
            known = _known
    return known


def _path_key(x: torch.Tensor, d_out: int, rank: int) -> Key:
    tokens = x.numel() // max(x.shape[-1], 1)
    block = 1 << max(rank - 1, 15).bit_length()
    return Key.of(choices.PATH, x, (tokens, x.shape[-1], d_out), block)


def _agree(found: object, expected: object) -> bool:
    """Whether floating-point outputs are equal up to rounding; of a different number of partial
    sums the totals are compared.
    """
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    for ours, theirs in pairs:
        if not theirs.is_floating_point():
            continue
        one, other = ours.detach().float(), theirs.detach().float()
        if one.shape != other.shape:
            one, other = one.sum(0), other.sum(0)
        if not (one - other).norm() <= _DISAGREEMENT * other.norm():  # also where not a number
            return False
    return True


def _tensors(found: object) -> list[torch.Tensor]:
    given = found if isinstance(found, tuple) else (found,)
    return [each for each in given if isinstance(each, torch.Tensor)]


def _unavailable(timer: Timer | None) -> str:
    """Why nothing can be timed; empty where it can."""
    try:
        launch = importlib.import_module("rellax_ds.kernels.launch")
    except ImportError as error:
        return str(error)
    if launch.interpreted():
        return "" if timer else "Triton interprets its kernels here"
    return str(launch.unavailable())


def _interpreted() -> bool:
    try:
        return bool(importlib.import_module("triton").knobs.runtime.interpret)
    except ImportError:
        return True


def _capturing() -> bool:
    """Whether the stream records a CUDA graph, in which nothing can be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _bench(call: Callable[[], object]) -> float:
    bench = importlib.import_module("triton.testing").do_bench
    return float(bench(call, warmup=10, rep=40, return_mode="median"))
