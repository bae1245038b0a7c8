"""The Triton paths: host side of the kernels, and the two ways of joining them.

`triton` computes the large products itself with the low-rank term inside; `cublas` writes the
low-rank term first and lets the library's product accumulate on it. Both share the skinny kernels.
Scratch for partial sums is allocated here and reduced in a fixed order. Importing this module needs
Triton and touches no device; under Triton's interpreter the same code runs on CPU tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
from triton import knobs

from rellax_ds.errors import KernelUnavailableError
from rellax_ds.kernels import configs, gemm, lowrank, tuning
from rellax_ds.kernels.choices import hardware
from rellax_ds.kernels.composable import ComposablePath
from rellax_ds.kernels.function import Optionals, Tensors
from rellax_ds.kernels.philox import Dropout

if TYPE_CHECKING:
    from rellax_ds.kernels.rows import Rows

_MIN_ARCHITECTURE = 80
_MIN_BLOCK_RANK = 16
_STACK = 3
_PROGRAMS = 96
_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels."""
    return bool(knobs.runtime.interpret)


def unavailable() -> str:
    """Why these paths cannot run here; empty where they can."""
    if interpreted():
        old = triton.__version__.startswith("3.6.")
        broken = old and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
        return "the interpreter of Triton 3.6 needs NumPy before 2.4" if broken else ""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible"
    found = hardware(torch.device("cuda", torch.cuda.current_device()))
    if (found.architecture or 0) < _MIN_ARCHITECTURE:
        return "the GPU is older than sm_80"
    return ""


class _SkinnyKernels(ComposablePath):
    """F1, B1, B2 and B4 by Triton."""

    stores_mask = True

    def down(
        self,
        x: torch.Tensor,
        A: Tensors,
        G: Optionals,
        rows: Rows,
        scalings: tuple[float, ...],
        dropout: Dropout | None,
        keep_mask: bool,
    ) -> tuple[Tensors, Tensors, Tensors]:
        """F1, one launch for up to three modules of one rank."""
        _check(x)
        if not x.shape[0]:
            return super().down(x, A, G, rows, scalings, None, keep_mask)
        x = x.contiguous()
        H: list[torch.Tensor] = [x] * len(A)
        S, mask = list(H), []
        for group in _groups(A):
            stacked = _stack([A[m] for m in group])
            gates = _gates([G[m] for m in group])
            streams = [dropout.streams[m] for m in group] if dropout else []
            hidden, gated, bits = _down(
                x, stacked, gates, rows, [scalings[m] for m in group], dropout, streams, keep_mask
            )
            if bits is not None:
                mask.append(bits)
            for place, m in enumerate(group):
                H[m], S[m] = hidden[place], gated[place]
        return tuple(H), tuple(S), tuple(mask)

    def grad_up(
        self, dys: Tensors, B: Tensors, S: Optionals, need_dS: bool
    ) -> tuple[Optionals, Optionals]:
        """B1; dS stays in partial sums [column chunks, T, r], which B2 adds up."""
        if not dys[0].shape[0]:
            return super().grad_up(dys, B, S, need_dS)
        found = [
            _grad_up(dy.contiguous(), b.contiguous(), s, need_dS)
            for dy, b, s in zip(dys, B, S, strict=True)
        ]
        return tuple(dS for dS, _ in found), tuple(dB for _, dB in found)

    def grad_gate(
        self,
        dS: Tensors,
        H: Optionals,
        G: Optionals,
        rows: Rows,
        scalings: tuple[float, ...],
        need_dH: bool,
    ) -> tuple[Optionals, Optionals]:
        """B2."""
        if not rows.tokens:
            return super().grad_gate(dS, H, G, rows, scalings, need_dH)
        found = [
            _grad_gate(ds, h, g, rows, s, need_dH)
            for ds, h, g, s in zip(dS, H, G, scalings, strict=True)
        ]
        return tuple(dH for dH, _ in found), tuple(dG for _, dG in found)

    def grad_down(
        self,
        dys: Tensors,
        weights: Tensors | None,
        dH: Tensors,
        A: Tensors,
        x: torch.Tensor | None,
        dropout: Dropout | None,
        mask: Tensors,
        need_dx: bool,
        need_dA: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, Optionals]:
        """B3 and B4."""
        if not dys[0].shape[0]:
            return super().grad_down(dys, weights, dH, A, x, None, (), need_dx, need_dA)
        planes = _planes(dH, A, dropout, mask)
        dx = None
        if need_dx:
            for m, (dh, a) in enumerate(zip(dH, A, strict=True)):
                pair = None if weights is None else (dys[m].contiguous(), weights[m])
                dx = self._into_x(pair, dh.to(a.dtype), a, dropout, planes[m], m, dx)
        dA: list[torch.Tensor | None] = [None] * len(A)
        if x is not None:
            x = x.contiguous()
            for group in _groups(A):
                if any(need_dA[m] for m in group):
                    gradients = _stack([dH[m].to(x.dtype) for m in group])
                    found = _grad_a(gradients, x, dropout, group, mask, A)
                    for place, m in enumerate(group):
                        dA[m] = found[place] if need_dA[m] else None
        return dx, tuple(dA)

    def _into_x(
        self,
        product: tuple[torch.Tensor, torch.Tensor] | None,
        dH: torch.Tensor,
        A: torch.Tensor,
        dropout: Dropout | None,
        bits: torch.Tensor | None,
        module: int,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        raise NotImplementedError


class TritonPath(_SkinnyKernels):
    """All six kernels; see `Path` for what each method computes."""

    name = "triton"

    def up(
        self, x: torch.Tensor, weights: Tensors, biases: Optionals, S: Tensors, B: Tensors
    ) -> Tensors:
        """F2."""
        if not x.shape[0]:
            return super().up(x, weights, biases, S, B)
        x = x.contiguous()
        return tuple(
            gemm_up(x, w, bias, s, b) for w, bias, s, b in zip(weights, biases, S, B, strict=True)
        )

    def _into_x(
        self,
        product: tuple[torch.Tensor, torch.Tensor] | None,
        dH: torch.Tensor,
        A: torch.Tensor,
        dropout: Dropout | None,
        bits: torch.Tensor | None,
        module: int,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        return gemm_down(product, dH, A, dropout, bits, module, out)


class CublasPath(_SkinnyKernels):
    """Skinny kernels around the library's products, which accumulate on the low-rank term."""

    name = "cublas"

    def up(
        self, x: torch.Tensor, weights: Tensors, biases: Optionals, S: Tensors, B: Tensors
    ) -> Tensors:
        """F2 as two products with beta = 1."""
        ys = []
        for w, bias, s, b in zip(weights, biases, S, B, strict=True):
            y = s @ b.t() if bias is None else torch.addmm(bias, s, b.t())
            ys.append(y.addmm_(x, w.t()))
        return tuple(ys)

    def _into_x(
        self,
        product: tuple[torch.Tensor, torch.Tensor] | None,
        dH: torch.Tensor,
        A: torch.Tensor,
        dropout: Dropout | None,
        bits: torch.Tensor | None,
        module: int,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        term = gemm_down(None, dH, A, dropout, bits, module, out)
        return term if product is None else term.addmm_(*product)


def gemm_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    S: torch.Tensor,
    B: torch.Tensor,
) -> torch.Tensor:
    """F2: x W^T + bias + S B^T, [T, d_out]."""
    (T, d_in), d_out = x.shape, weight.shape[0]
    out = x.new_empty(T, d_out)
    rank = B.shape[1]
    _gemm(
        (x, weight, S.contiguous(), B.contiguous(), bias, out, None, None),
        (T, d_out, d_in, weight.stride(1), weight.stride(0), 1, rank),
        (0, 1.0, 0),
        rank,
        BIAS=bias is not None,
        DROPOUT=False,
        STORED=False,
        ACCUMULATE=False,
    )
    return out


def gemm_down(
    product: tuple[torch.Tensor, torch.Tensor] | None,
    dH: torch.Tensor,
    A: torch.Tensor,
    dropout: Dropout | None,
    bits: torch.Tensor | None,
    module: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """B3: dy W + mask * (dH A) / (1 - p), [T, d_in], added to `out` where given.

    Args:
        product: dy [T, d_out] and W [d_out, d_in]; None leaves the low-rank term only.
        dH: [T, r].
        A: [r, d_in].
        dropout: The call's dropout, or None.
        bits: Packed mask [T, ceil(d_in / 8)]; None draws it again.
        module: Which stream of the dropout.
        out: Changed in place and returned.
    """
    accumulate = out is not None
    (T, rank), d_in = dH.shape, A.shape[1]
    out = dH.new_empty(T, d_in) if out is None else out
    dy, weight = (dH, A) if product is None else product
    depth = 0 if product is None else dy.shape[1]
    _gemm(
        (
            dy,
            weight,
            dH.contiguous(),
            A.contiguous(),
            None,
            out,
            bits,
            None if dropout is None else dropout.seed,
        ),
        (T, d_in, depth, weight.stride(0), weight.stride(1), d_in, 1),
        (0, 1.0, 0)
        if dropout is None
        else (dropout.threshold, dropout.scale, dropout.streams[module]),
        rank,
        BIAS=False,
        DROPOUT=dropout is not None,
        STORED=bits is not None,
        ACCUMULATE=accumulate,
    )
    return out


def _gemm(
    tensors: tuple[torch.Tensor | None, ...],
    sizes: tuple[int, ...],
    dropout: tuple[int, float, int],
    rank: int,
    **flags: bool,
) -> None:
    out = tensors[5]
    assert out is not None

    def call(config: configs.Launch, into: torch.Tensor = out) -> torch.Tensor:
        tiles = triton.cdiv(sizes[0], config.tile("BM")) * triton.cdiv(sizes[1], config.tile("BN"))
        given = (*tensors[:5], into, *tensors[6:])
        filled = tuple(into if t is None else t for t in given)
        gemm.gemm_kernel[(tiles,)](
            *filled, *sizes, *dropout, R=rank, BR=block_rank(rank), **flags, **config.options()
        )
        return into

    def trial(config: configs.Launch) -> torch.Tensor:
        return call(config, out.clone() if flags["ACCUMULATE"] else torch.empty_like(out))

    kernel = "gemm_masked" if flags["STORED"] else "gemm"
    widths = (sizes[0], sizes[2], sizes[1])
    tuning.launched(
        kernel, out, block_rank(rank), widths, call, trial, **flags, TRANSPOSED=sizes[3] == 1
    )


def _down(
    x: torch.Tensor,
    A: torch.Tensor,
    G: torch.Tensor | None,
    rows: Rows,
    scalings: list[float],
    dropout: Dropout | None,
    streams: list[int],
    keep_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    (N, rank, d), T = A.shape, x.shape[0]
    shared = len(set(streams)) <= 1
    stores = dropout is not None and keep_mask
    flags = {
        "N": N,
        "GATED": G is not None,
        "DROPOUT": dropout is not None,
        "SHARED": shared,
        "STORE": stores,
    }

    def call(
        config: configs.Launch,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        tiles = rows.tiles(config.tile("BM"), x.device)
        H, S = x.new_empty(2, N, T, rank).unbind()
        bits = None
        if stores:
            planes = 1 if shared else N
            bits = torch.empty(planes, T, -(-d // 8), dtype=torch.uint8, device=x.device)
        lowrank.down_kernel[(tiles.shape[0],)](
            x,
            A,
            A if G is None else G,
            H,
            S,
            A if bits is None else bits,
            tiles if dropout is None else dropout.seed,
            tiles,
            T,
            d,
            rows.samples,
            0 if dropout is None else dropout.threshold,
            1.0 if dropout is None else dropout.scale,
            *_three(scalings, 1.0),
            *_three(streams, 0),
            R=rank,
            BR=block_rank(rank),
            **flags,
            **config.options(),
        )
        return H, S, bits

    return tuning.launched("down", x, block_rank(rank), (T, d, 0), call, **flags)


def _grad_up(
    dy: torch.Tensor, B: torch.Tensor, S: torch.Tensor | None, need_dS: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    (T, d), rank = dy.shape, B.shape[1]
    if S is None and not need_dS:
        return None, None
    flags = {"NEED_S": need_dS, "NEED_B": S is not None}

    def call(config: configs.Launch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        chunks = triton.cdiv(d, config.tile("BN"))
        share, shares = _shares(T, config.tile("BM"), chunks)
        dS = dy.new_empty(chunks, T, rank, dtype=torch.float32) if need_dS else None
        dB = None if S is None else dy.new_empty(shares, d, rank, dtype=torch.float32)
        lowrank.grad_up_kernel[(chunks, shares)](
            dy,
            B,
            B if S is None else S.contiguous(),
            B if dS is None else dS,
            B if dB is None else dB,
            T,
            d,
            share,
            R=rank,
            BR=block_rank(rank),
            **flags,
            **config.options(),
        )
        return dS, None if dB is None else dB.sum(0)

    return tuning.launched("grad_up", dy, block_rank(rank), (T, 0, d), call, **flags)


def _grad_gate(
    dS: torch.Tensor,
    H: torch.Tensor | None,
    G: torch.Tensor | None,
    rows: Rows,
    scaling: float,
    need_dH: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    chunks, T, rank = dS.shape
    narrow = dS.dtype if H is None else H.dtype
    flags = {"GATED": G is not None, "NEED_H": need_dH, "NEED_G": H is not None}

    def call(config: configs.Launch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        tiles = rows.tiles(config.tile("BM"), dS.device)
        dH = dS.new_empty(T, rank, dtype=narrow) if need_dH else None
        parts = None if H is None else dS.new_empty(tiles.shape[0], rank, rank)
        lowrank.grad_gate_kernel[(tiles.shape[0],)](
            dS,
            dS if H is None else H.contiguous(),
            dS if G is None else G.contiguous(),
            dS if dH is None else dH,
            dS if parts is None else parts,
            tiles,
            T,
            chunks,
            scaling,
            R=rank,
            BR=block_rank(rank),
            **flags,
            **config.options(),
        )
        if parts is None:
            return dH, None
        order, offsets = rows.tiles_by_sample(config.tile("BM"), dS.device)
        dG = dS.new_empty(rows.samples, rank, rank)
        size = rank * rank
        lowrank.segment_kernel[(rows.samples,)](
            parts, order, offsets, dG, SIZE=size, BLOCK=triton.next_power_of_2(size)
        )
        return dH, dG

    return tuning.launched(
        "grad_gate", dS, block_rank(rank), (T, 0, 0), call, **flags, chunks=chunks
    )


def _grad_a(
    dH: torch.Tensor,
    x: torch.Tensor,
    dropout: Dropout | None,
    group: list[int],
    mask: Tensors,
    A: Tensors,
) -> torch.Tensor:
    (N, T, rank), d = dH.shape, x.shape[1]
    streams = [dropout.streams[m] for m in group] if dropout else []
    bits = mask[_groups(A).index(group)] if mask else None
    flags = {
        "N": N,
        "DROPOUT": dropout is not None,
        "SHARED": len(set(streams)) <= 1,
        "STORED": bits is not None,
    }

    def call(config: configs.Launch) -> torch.Tensor:
        chunks = triton.cdiv(d, config.tile("BN"))
        share, shares = _shares(T, config.tile("BM"), chunks)
        parts = x.new_empty(shares, N, d, rank, dtype=torch.float32)
        lowrank.grad_a_kernel[(chunks, shares)](
            dH,
            x,
            parts,
            x if bits is None else bits,
            x if dropout is None else dropout.seed,
            T,
            d,
            share,
            0 if dropout is None else dropout.threshold,
            1.0 if dropout is None else dropout.scale,
            *_three(streams, 0),
            R=rank,
            BR=block_rank(rank),
            **flags,
            **config.options(),
        )
        return parts.sum(0).transpose(1, 2)

    return tuning.launched("grad_a", x, block_rank(rank), (T, d, 0), call, **flags)


def block_rank(rank: int) -> int:
    """Width of a rank's block in registers."""
    return max(_MIN_BLOCK_RANK, triton.next_power_of_2(rank))


def _groups(A: Tensors) -> list[list[int]]:
    """Modules that one launch serves: the same rank, at most three."""
    groups: list[list[int]] = []
    for m, a in enumerate(A):
        last = groups[-1] if groups else []
        if last and len(last) < _STACK and A[last[0]].shape[0] == a.shape[0]:
            last.append(m)
        else:
            groups.append([m])
    return groups


def _planes(
    dH: Tensors, A: Tensors, dropout: Dropout | None, mask: Tensors
) -> list[torch.Tensor | None]:
    """Packed mask of every module, or None where it is drawn again."""
    planes: list[torch.Tensor | None] = [None] * len(A)
    for group, bits in zip(_groups(A), mask, strict=False):
        for place, m in enumerate(group):
            planes[m] = bits[min(place, bits.shape[0] - 1)]
    return planes


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One contiguous tensor of the modules' tensors; no copy of a single contiguous one."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].contiguous()[None]


def _gates(gates: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Stacked gates of a launch; a module without one gets the identity beside gated modules."""
    given = [g for g in gates if g is not None]
    if not given:
        return None
    identity = torch.eye(given[0].shape[1], dtype=given[0].dtype, device=given[0].device)
    return _stack([identity.expand_as(given[0]) if g is None else g for g in gates])


def _three(values: list[float] | list[int], filler: float) -> tuple[float, ...]:
    return (*values, *[filler] * (_STACK - len(values)))


def _shares(tokens: int, block: int, chunks: int) -> tuple[int, int]:
    """Rows of a program's share, a multiple of its block, and the number of shares.

    Every share costs a partial sum in memory, so there are only as many as keep a large GPU busy
    together with the column chunks; the number does not depend on the GPU, hence neither does the
    order of a sum.
    """
    wanted = max(_PROGRAMS // chunks, 1)
    rows = triton.cdiv(triton.cdiv(tokens, wanted), block) * block
    return rows, triton.cdiv(tokens, rows)


def _check(x: torch.Tensor) -> None:
    if x.dtype not in _TYPES:
        raise KernelUnavailableError(
            f"the Triton paths compute 16-bit and float32 tensors, not {x.dtype}; use 'composable'"
        )
    if interpreted() and x.dtype == torch.bfloat16:
        raise KernelUnavailableError(
            "Triton's interpreter multiplies bfloat16 tiles wrongly; use float16 or float32 there"
        )
