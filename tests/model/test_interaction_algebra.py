"""The family's algebra: each method's own formula against its M(h), and which kind contains which.

Every statement is checked in float64 to 1e-10, in value and in every gradient. The operator is
written out here as its definition; that each compute path equals it is tested with the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from rellax_ds.family import InteractionSpec
from rellax_ds.model.interaction import expert_gates, interaction_gates, stacked_interaction

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES, LENGTH, D_IN, D_OUT, RANK, EXPERTS = 2, 3, 11, 10, 6, 3
SIZE = RANK // EXPERTS
ALPHA = 9.0
SCALING = ALPHA / RANK

KINDS: dict[str, dict[str, Any]] = {
    "scalar": {},
    "diag": {},
    "block": {},
    "block_full": {},
    "moe": {"temperature": 3.0},
    "rec_sum": {},
    "rec_prod": {},
    "full": {},
    "full_factorised": {"kind": "full", "head": "factorised", "factors": 2},
}


def spec_of(case: str) -> InteractionSpec:
    return InteractionSpec(**{"kind": case, "rank": RANK, "experts": EXPERTS} | KINDS[case])


@dataclass
class Problem:
    """Random x [B, L, d_in], A, B and head outputs; fresh leaves for every evaluation."""

    outputs: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        shapes = {
            "x": (SAMPLES, LENGTH, D_IN),
            "A": (RANK, D_IN),
            "B": (D_OUT, RANK),
            "f": (SAMPLES, self.outputs),
        }
        self.values = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        self.upstream = torch.randn(
            SAMPLES, LENGTH, D_OUT, generator=generator, dtype=torch.float64
        )

    def evaluate(self, function: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        """The function's value and its gradient for x, A, B and f."""
        leaves = {name: v.clone().requires_grad_() for name, v in self.values.items()}
        value = function(**leaves)
        value.backward(self.upstream)
        found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {"value": value.detach()} | found

    def assert_equal(
        self, one: Callable[..., torch.Tensor], two: Callable[..., torch.Tensor]
    ) -> None:
        """Same value and same gradients; an input neither uses has no gradient on either side."""
        wanted, found = self.evaluate(two), self.evaluate(one)
        assert wanted.keys() == found.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


def operator(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, G: torch.Tensor, s: float = SCALING
) -> torch.Tensor:
    """s B M A x for every token, with M = G^T."""
    return s * (x @ A.T @ G) @ B.T


def lora(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """Plain LoRA at alpha / R."""
    return SCALING * x @ A.T @ B.T


def method(case: str, s: float = SCALING) -> Callable[..., torch.Tensor]:
    spec = spec_of(case)
    return lambda x, A, B, f: operator(x, A, B, interaction_gates(spec, f), s)


@pytest.mark.parametrize("case", KINDS)
def test_composite_view_equals_the_sum_of_rank_one_atoms(case: str) -> None:
    spec = spec_of(case)

    def decomposed(x: Any, A: Any, B: Any, f: Any) -> torch.Tensor:
        M = interaction_gates(spec, f).transpose(-2, -1)
        y = torch.zeros(SAMPLES, LENGTH, D_OUT, dtype=torch.float64)
        for i in range(RANK):
            for j in range(RANK):
                read = x @ A[j]
                y = y + SCALING * (M[:, i, j, None] * read)[..., None] * B[:, i]
        return y

    Problem(spec.outputs).assert_equal(method(case), decomposed)


@pytest.mark.parametrize("case", ["scalar", "diag", "block_full", "full"])
def test_unit_coefficients_are_plain_lora(case: str) -> None:
    spec = spec_of(case)
    problem = Problem(spec.outputs)
    problem.values["f"].zero_()
    factors = {n: problem.evaluate(method(case))[n] for n in ("value", "x", "A", "B")}
    for name, tensor in problem.evaluate(lora).items():
        torch.testing.assert_close(factors[name], tensor, rtol=0, atol=1e-10)


def bands(A: torch.Tensor, B: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(A.split(SIZE), B.split(SIZE, dim=1), strict=True))


def weighted(w: torch.Tensor) -> torch.Tensor:
    return w[:, None, None]


def test_block_equals_ilora_in_its_split_form() -> None:
    def split(x: Any, A: Any, B: Any, f: Any) -> torch.Tensor:
        w = torch.softmax(f, -1)
        parts = [weighted(w[:, k]) * (x @ a.T @ b.T) for k, (a, b) in enumerate(bands(A, B))]
        return ALPHA / (RANK / EXPERTS) * sum(parts)

    problem = Problem(EXPERTS)
    problem.assert_equal(method("block"), split)
    problem.values["f"].fill_(0.7)
    uniform = problem.evaluate(method("block"))
    for name, tensor in problem.evaluate(lora).items():
        torch.testing.assert_close(uniform[name], tensor, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["moe", "rec_sum"])
def test_mixtures_of_products_equal_separate_banks(case: str) -> None:
    spec = spec_of(case)

    def banks(x: Any, A: Any, B: Any, f: Any) -> torch.Tensor:
        w = torch.softmax(f / spec.temperature, -1)
        parts = [weighted(w[:, k]) * (x @ (b @ a).T) for k, (a, b) in enumerate(bands(A, B))]
        return SCALING * sum(parts)

    Problem(EXPERTS).assert_equal(method(case), banks)


def test_moe_at_n_times_the_scale_is_block() -> None:
    moe = InteractionSpec("moe", RANK, EXPERTS)
    Problem(EXPERTS).assert_equal(
        lambda x, A, B, f: operator(x, A, B, interaction_gates(moe, f), EXPERTS * SCALING),
        method("block"),
    )


def test_moe_and_rec_sum_are_a_kronecker_product() -> None:
    w = torch.rand(4, EXPERTS, dtype=torch.float64)
    for case in ("moe", "rec_sum"):
        gates = expert_gates(spec_of(case), w)
        for row, gate in zip(w, gates, strict=True):
            assert torch.equal(gate, torch.kron(torch.diag(row), torch.eye(SIZE).double()))


def test_rec_prod_equals_mixed_factors_multiplied() -> None:
    def direct(x: Any, A: Any, B: Any, f: Any) -> torch.Tensor:
        w = torch.softmax(f, -1)
        pairs = bands(A, B)
        down = sum(w[:, k, None, None] * a for k, (a, _) in enumerate(pairs))
        up = sum(w[:, k, None, None] * b for k, (_, b) in enumerate(pairs))
        return SCALING * x @ down.mT @ up.mT

    Problem(EXPERTS).assert_equal(method("rec_prod"), direct)


def test_rec_prod_has_the_rank_of_one_expert() -> None:
    problem = Problem(EXPERTS)
    gates = interaction_gates(spec_of("rec_prod"), problem.values["f"])
    assert torch.linalg.matrix_rank(gates).tolist() == [SIZE] * SAMPLES
    other = interaction_gates(spec_of("rec_sum"), problem.values["f"])
    assert torch.linalg.matrix_rank(other).tolist() == [RANK] * SAMPLES


def test_rec_prod_meets_rec_sum_at_one_hot_weights_and_has_w_on_the_diagonal_for_its_root() -> None:
    product, mixture = spec_of("rec_prod"), spec_of("rec_sum")
    one_hot = torch.eye(EXPERTS, dtype=torch.float64)
    assert torch.equal(expert_gates(product, one_hot), expert_gates(mixture, one_hot))
    w = torch.softmax(torch.randn(4, EXPERTS, dtype=torch.float64), -1)
    diagonal = expert_gates(product, w.sqrt()).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, w.repeat_interleave(SIZE, -1), rtol=0, atol=1e-10)
    coefficients = diagonal[:, ::SIZE].sum(-1)
    torch.testing.assert_close(coefficients, torch.ones(4).double(), rtol=0, atol=1e-10)


def test_constant_matrix_is_absorbed_by_b() -> None:
    torch.manual_seed(5)
    static = stacked_interaction(InteractionSpec("full_static", RANK), 2, None).double()
    with torch.no_grad():
        static.offset.normal_()
    for layer, M in enumerate(static.matrices().detach()):

        def with_matrix(x: Any, A: Any, B: Any, f: Any, layer: int = layer) -> torch.Tensor:
            return operator(x, A, B, static(x[:, 0])[layer])

        def absorbed(x: Any, A: Any, B: Any, f: Any, M: torch.Tensor = M) -> torch.Tensor:
            return lora(x, A, B @ M, f)

        Problem(1).assert_equal(with_matrix, absorbed)


def test_gauge_change_of_the_read_directions_is_undone_by_m() -> None:
    generator = torch.Generator().manual_seed(6)
    P = torch.randn(RANK, RANK, generator=generator, dtype=torch.float64)
    assert torch.linalg.cond(P) < 100
    inverse = torch.linalg.inv(P)

    def changed(x: Any, A: Any, B: Any, f: Any) -> torch.Tensor:
        M = interaction_gates(spec_of("full"), f).mT
        return operator(x, P @ A, B, (M @ inverse).mT)

    Problem(RANK**2).assert_equal(changed, method("full"))


@pytest.mark.parametrize("case", KINDS)
def test_update_stays_in_the_span_of_the_factors(case: str) -> None:
    spec = spec_of(case)
    problem = Problem(spec.outputs)
    A, B = problem.values["A"], problem.values["B"]
    updates = SCALING * B @ interaction_gates(spec, problem.values["f"]).mT @ A
    onto_b, onto_a = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    torch.testing.assert_close(onto_b @ updates, updates, rtol=0, atol=1e-10)
    torch.testing.assert_close(updates @ onto_a, updates, rtol=0, atol=1e-10)
    assert (torch.linalg.matrix_rank(updates) <= RANK).all()
    assert not torch.allclose(onto_b, torch.eye(D_OUT).double())


def scalar_in_block(f: torch.Tensor) -> torch.Tensor:
    return expert_gates(spec_of("block"), ((1 + f) / EXPERTS).expand(-1, EXPERTS))


def block_in_diag(w: torch.Tensor) -> torch.Tensor:
    return interaction_gates(spec_of("diag"), EXPERTS * w.repeat_interleave(SIZE, -1) - 1)


def diag_in_block_full(f: torch.Tensor) -> torch.Tensor:
    return interaction_gates(
        spec_of("block_full"), torch.diag_embed(f.view(-1, EXPERTS, SIZE)).flatten(1)
    )


def diag_in_full(f: torch.Tensor) -> torch.Tensor:
    return interaction_gates(spec_of("full"), torch.diag_embed(f).flatten(1))


def block_full_in_full(f: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros(len(f), RANK, RANK, dtype=f.dtype)
    for k, block in enumerate(f.view(-1, EXPERTS, SIZE, SIZE).unbind(1)):
        wide[:, k * SIZE : (k + 1) * SIZE, k * SIZE : (k + 1) * SIZE] = block
    return interaction_gates(spec_of("full"), wide.flatten(1))


def block_full_of_one_expert(f: torch.Tensor) -> torch.Tensor:
    return interaction_gates(InteractionSpec("block_full", RANK, experts=1), f)


def factorised_in_full(f: torch.Tensor) -> torch.Tensor:
    u, v = f.view(-1, 2, RANK, 2).unbind(1)
    return interaction_gates(spec_of("full"), (u @ v.mT).mT.flatten(1))


def rec_prod_in_full(f: torch.Tensor) -> torch.Tensor:
    w = torch.softmax(f, -1)
    pairs = w.unsqueeze(-1) * w.unsqueeze(-2)
    wide = torch.stack([torch.kron(p, torch.eye(SIZE).double()) for p in pairs])
    return interaction_gates(spec_of("full"), (wide - torch.eye(RANK).double()).flatten(1))


def free_block(w: torch.Tensor) -> torch.Tensor:
    return expert_gates(spec_of("block"), w)


NESTED: list[tuple[str, int, Callable[..., torch.Tensor] | None, Callable[..., torch.Tensor]]] = [
    ("scalar", 1, None, scalar_in_block),
    ("block", EXPERTS, free_block, block_in_diag),
    ("diag", RANK, None, diag_in_block_full),
    ("diag", RANK, None, diag_in_full),
    ("block_full", EXPERTS * SIZE**2, None, block_full_in_full),
    ("full", RANK**2, None, block_full_of_one_expert),
    ("full_factorised", 2 * 2 * RANK, None, factorised_in_full),
    ("rec_prod", EXPERTS, None, rec_prod_in_full),
]


@pytest.mark.parametrize(
    ("small", "outputs", "gates", "embedded"), NESTED, ids=[case[3].__name__ for case in NESTED]
)
def test_nesting_by_an_explicit_map(
    small: str,
    outputs: int,
    gates: Callable[..., torch.Tensor] | None,
    embedded: Callable[..., Any],
) -> None:
    own = gates or (lambda f: interaction_gates(spec_of(small), f))
    Problem(outputs).assert_equal(
        lambda x, A, B, f: operator(x, A, B, embedded(f)),
        lambda x, A, B, f: operator(x, A, B, own(f)),
    )


def test_nesting_is_strict() -> None:
    problem = Problem(RANK**2)
    f = problem.values["f"]
    diagonal = interaction_gates(spec_of("diag"), f[:, :RANK])
    assert not torch.allclose(diagonal[:, 0, 0], diagonal[:, 1, 1])
    blocks = interaction_gates(spec_of("block_full"), f[:, : EXPERTS * SIZE**2])
    assert blocks[:, 0, 1].abs().min() > 1e-3
    assert blocks[:, 0, SIZE].abs().max() == 0
    assert interaction_gates(spec_of("full"), f)[:, 0, SIZE].abs().min() > 1e-3
    product = interaction_gates(spec_of("rec_prod"), f[:, :EXPERTS])
    assert product[:, 0, SIZE].abs().min() > 1e-3


def test_softmax_fixes_the_trace_so_a_scalar_gate_is_outside() -> None:
    f = Problem(EXPERTS).values["f"]
    traces = {
        case: interaction_gates(spec_of(case), 3 * f).diagonal(dim1=-2, dim2=-1).sum(-1)
        for case in ("block", "moe", "rec_sum")
    }
    for case, wanted in (("block", RANK), ("moe", SIZE), ("rec_sum", SIZE)):
        torch.testing.assert_close(
            traces[case], torch.full((SAMPLES,), float(wanted)).double(), rtol=0, atol=1e-10
        )
    halved = interaction_gates(spec_of("scalar"), torch.full((1, 1), -0.5).double())
    assert halved.diagonal(dim1=-2, dim2=-1).sum().item() == RANK / 2


def test_only_kinds_with_free_off_diagonal_entries_feel_the_transpose() -> None:
    for case in KINDS:
        gates = interaction_gates(spec_of(case), Problem(spec_of(case).outputs).values["f"])
        symmetric = torch.allclose(gates, gates.mT)
        assert symmetric == (case not in ("block_full", "full", "full_factorised")), case
