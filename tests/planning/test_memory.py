"""Every formula of the plan against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rellax_ds.planning import memory
from rellax_ds.planning.memory import GIB, Layout, Load, Term
from rellax_ds.planning.parameters import Decoder, ModelShape, Weight

LINEAR = Weight("body.layer.weight", 1001, "backbone", trained=False)
NORM = Weight("body.norm.weight", 10, "backbone", trained=False)
HEAD = Weight("head.weight", 4000, "backbone", trained=False)
GATE = Weight("gates.weight", 103, "interaction", trained=True)
WEIGHTS = (LINEAR, NORM, HEAD, GATE)
DECODER = Decoder(
    hidden=8,
    intermediate=20,
    layers=3,
    query=8,
    key_value=4,
    normed=16,
    adapted=24,
    vocabulary=100,
)
LAYOUT = Layout(ranks=4, stage=3, element=2, persistence=50, live=3000, bucket=500)
LOAD = Load(tokens=10, eval_tokens=5, answers=2, vocabulary_loss=False, checkpointing=False, cuda=1)


def table(layout: Layout, load: Load = LOAD, weights: tuple[Weight, ...] = WEIGHTS) -> dict:
    return {term.name: term for term in memory.terms(ModelShape(weights, DECODER), layout, load)}


def test_shards_are_padded_to_the_ranks_one_by_one() -> None:
    assert memory.weights_held([LINEAR, NORM], 4, 2) == (251 + 3) * 2
    assert memory.weights_held([LINEAR, NORM], 1, 2) == 1011 * 2


def test_small_parameters_stay_whole_up_to_the_limit_on_all() -> None:
    assert memory.persistent(WEIGHTS, LAYOUT) == {"body.norm.weight"}
    wide = replace(LAYOUT, persistence=103)
    assert memory.persistent(WEIGHTS, wide) == {"body.norm.weight", "gates.weight"}
    assert memory.persistent(WEIGHTS, replace(wide, persistence_in_all=112)) == {"body.norm.weight"}
    assert memory.persistent_weights(WEIGHTS, wide) == 10 * 2 + 103 * 4


@pytest.mark.parametrize(("live", "size"), [(3000, 8000), (4500, 9000), (9000, 5001 * 2 + 103 * 4)])
def test_window_is_the_live_limit_between_the_largest_module_and_the_whole(
    live: int, size: int
) -> None:
    assert memory.gather_window(WEIGHTS, replace(LAYOUT, live=live)) == size


def test_one_rank_gathers_nothing_unless_its_weights_lie_elsewhere() -> None:
    alone = replace(LAYOUT, ranks=1)
    assert memory.gather_window(WEIGHTS, alone) == 0
    assert memory.persistent_weights(WEIGHTS, alone) == 0
    assert memory.gather_window(WEIGHTS, replace(alone, weights="cpu")) == 4000 * 2


@pytest.mark.parametrize(
    ("stage", "frozen", "trained", "gradients", "adam"),
    [
        (0, 5011 * 2, 103 * 4, 103 * 6, 103 * 12),
        (1, 5011 * 2, 103 * 4, 103 * 6, 26 * 12),
        (2, 5011 * 2, 103 * 4, 26 * 6, 26 * 12),
        (3, (251 + 3 + 1000) * 2, 26 * 4, 26 * 6, 26 * 12),
    ],
)
def test_stage_divides_one_thing_more_each(
    stage: int, frozen: int, trained: int, gradients: int, adam: int
) -> None:
    found = table(replace(LAYOUT, stage=stage))
    assert found["frozen weights"].device == frozen
    assert found["trained weights"].device == trained
    assert found["gradients"].device == gradients
    assert found["Adam state"].device == adam
    assert ("gather window" in found) == (stage == 3)


def test_plain_float32_training_has_no_second_copy_of_the_weights() -> None:
    plain = replace(LAYOUT, stage=0, element=4)
    assert memory.optimizer_state([GATE], plain) == 103 * 8
    assert memory.gradients([GATE], plain) == 103 * 4


def test_offload_moves_weights_and_adam_to_the_host_or_to_nvme() -> None:
    host = table(replace(LAYOUT, weights="cpu", optimizer="cpu"))
    assert host["frozen weights"] == Term("frozen weights", host=1254 * 2)
    assert host["gradients"] == Term("gradients", host=26 * 6)
    assert host["Adam state"] == Term("Adam state", host=26 * 12)
    nvme = replace(
        LAYOUT, weights="nvme", optimizer="nvme", weight_buffers=700, optimizer_buffers=4
    )
    found = table(nvme)
    assert found["frozen weights"] == Term("frozen weights", nvme=1254 * 2)
    assert found["weight buffers"] == Term("weight buffers", host=700)
    assert found["Adam state"] == Term("Adam state", host=4 * 26 * 4, nvme=26 * 12)


def test_four_bits_cost_half_a_byte_a_constant_a_block_and_one_layer_unpacked() -> None:
    found = table(LAYOUT, weights=(replace(LINEAR, quantised=True), NORM, HEAD, GATE))
    packed = 251  # ceil(1001 / 4) elements of two bytes
    assert found["frozen weights"].device == (-(-packed // 4) + 3 + 1000) * 2
    assert found["4-bit block constants"].device == 16 * 4
    assert found["4-bit layer unpacked"].device == 1001 * 2


def test_activations_by_block_and_with_checkpoints() -> None:
    block = 4 * 16 + 2 * (2 * 8 + 2 * 4 + 3 * 20 + 24 // 3)
    rest = 8 * 8 + 3 * 2 * 20 + 12 * 8  # ends, then the workspace of one block
    assert memory.activations(DECODER, 2, 10, checkpointing=False) == 10 * (3 * block + rest)
    assert memory.activations(DECODER, 2, 10, checkpointing=True) == 10 * (3 * 2 * 8 + block + rest)


def test_a_large_evaluation_batch_is_what_counts() -> None:
    found = table(LAYOUT, replace(LOAD, eval_tokens=1000))
    assert found["activations in evaluation"].device == 1000 * 2 * (4 * 8 + 3 * 20)
    assert "activations" not in found


def test_logits_are_counted_at_answers_only() -> None:
    assert memory.answer_logits(DECODER, 2, LOAD) == 2 * 8 * 6 + 2 * 16
    whole = replace(LOAD, vocabulary_loss=True)
    assert memory.answer_logits(DECODER, 2, whole) == 2 * 8 * 6 + 2 * 14 * 100


def test_reduce_bucket_is_allocated_whole_where_gradients_are_contiguous() -> None:
    assert memory.reduce_bucket([GATE], LAYOUT) == 500 * 2
    assert memory.reduce_bucket([GATE], replace(LAYOUT, contiguous=False)) == 103 * 2


def test_total_adds_up_and_a_cpu_has_no_context() -> None:
    found = table(LAYOUT)
    assert memory.total(found.values()).device == sum(term.device for term in found.values())
    assert found["CUDA and NCCL"].device == memory.CONTEXT == int(1.2 * GIB)
    assert "CUDA and NCCL" not in table(LAYOUT, replace(LOAD, cuda=False))


def test_layout_reads_the_json_and_fills_in_deepspeeds_defaults() -> None:
    zero = {"stage": 3, "offload_param": {"device": "nvme", "buffer_count": 2, "buffer_size": 30}}
    layout = Layout.of({"zero_optimization": zero, "bf16": {"enabled": True}}, 8)
    assert (layout.live, layout.bucket, layout.persistence) == (1_050_000_000, 500_000_000, 100_000)
    assert (layout.weights, layout.optimizer, layout.weight_buffers) == ("nvme", "none", 120)
