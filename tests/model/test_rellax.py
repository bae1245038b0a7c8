"""The whole model: what reaches a logit, what does not, and what is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional as F

from rellax_ds.errors import CheckpointError, ConfigError
from rellax_ds.model.backbone import load_backbone
from rellax_ds.model.rellax import build_rellax, parameter_counts, trainable_groups

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rellax_ds.batch import Batch
    from rellax_ds.model.rellax import ReLLaX

FAMILIES = ["llama", "qwen2", "gpt2"]


def scores(model: ReLLaX, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch.tensors())[1]


def take(batch: Batch, row: int) -> Batch:
    """One sample of a right-padded batch, without its padding."""
    length = int(batch.attention_mask[row].sum())
    slots, answers = batch.slot_rows == row, batch.answer_rows == row
    first = int(answers.nonzero()[0])
    return replace(
        batch,
        sample_ids=batch.sample_ids[[row]],
        input_ids=batch.input_ids[[row], :length],
        attention_mask=batch.attention_mask[[row], :length],
        slot_rows=batch.slot_rows[slots] * 0,
        slot_positions=batch.slot_positions[slots],
        slot_vectors=batch.slot_vectors[slots],
        instance=batch.instance[[row]],
        answer_rows=batch.answer_rows[answers] * 0,
        answer_positions=batch.answer_positions[answers],
        answer_labels=batch.answer_labels[answers],
        answer_weights=batch.answer_weights[answers],
        target_index=batch.target_index[[row]] - first,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_full_forward_of_the_causal_lm(
    build: Callable[..., ReLLaX], batch: Batch, family: str
) -> None:
    model = build(family).eval()
    embeddings = model.backbone.get_input_embeddings()(batch.input_ids)
    for slot, (row, position) in enumerate(zip(batch.slot_rows, batch.slot_positions, strict=True)):
        embeddings[row, position] = model.spa(batch.slot_vectors[[slot]])[0]
    with torch.no_grad(), model.llm.base_model.conditioned(batch.instance):
        logits = model.llm(inputs_embeds=embeddings, attention_mask=batch.attention_mask).logits
    answers = logits[batch.answer_rows, batch.answer_positions][batch.target_index]
    torch.testing.assert_close(
        scores(model, batch), answers[:, 11] - answers[:, 12], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_left_and_right_padding_agree(
    build: Callable[..., ReLLaX], batch: Batch, left_batch: Batch, family: str
) -> None:
    model = build(family).eval()
    right, left = scores(model, batch), scores(model, left_batch)
    torch.testing.assert_close(right, left, rtol=0, atol=1e-5)
    assert right.std() > 1e-2


def test_scores_of_a_bfloat16_backbone_stay_near_float32(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    full, half = build().eval(), build(dtype=torch.bfloat16).eval()
    assert half.backbone.get_output_embeddings().weight.dtype == torch.bfloat16
    assert next(iter(trainable_groups(half)["factors"].values())).dtype == torch.float32
    torch.testing.assert_close(scores(half, batch), scores(full, batch), rtol=0, atol=0.15)


def test_scores_do_not_depend_on_the_rest_of_the_batch(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build().eval()
    alone = torch.cat([scores(model, take(batch, row)) for row in range(3)])
    torch.testing.assert_close(scores(model, batch), alone, rtol=0, atol=1e-5)


def test_scores_answer_to_their_own_instance_only(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build().eval()
    other = batch.instance.clone()
    other[1] = torch.randn(5)
    change = (scores(model, batch) - scores(model, replace(batch, instance=other))).abs()
    assert change[[0, 2]].max() == 0
    assert change[1] > 1e-3


def test_scores_answer_to_their_own_slots_only_and_ignore_padding_ids(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build().eval()
    before = scores(model, batch)
    vectors = batch.slot_vectors.clone()
    vectors[0] += 1.0
    change = (before - scores(model, replace(batch, slot_vectors=vectors))).abs()
    assert change[0] > 1e-4
    assert change[[1, 2]].max() == 0
    ids = batch.input_ids.clone()
    ids[batch.slot_rows, batch.slot_positions] = 13
    ids[batch.attention_mask == 0] = 13
    torch.testing.assert_close(scores(model, replace(batch, input_ids=ids)), before)


def test_scores_without_spa_read_the_words_and_no_slots(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build(spa=False).eval()
    before = scores(model, batch)
    assert torch.equal(before, scores(model, replace(batch, slot_vectors=batch.slot_vectors + 1)))
    assert "spa" not in trainable_groups(model)


def test_loss_yes_no_is_weighted_cross_entropy_of_every_answer(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build().eval()
    every = replace(batch, target_index=torch.arange(5))
    margins = scores(model, every)
    loss, _ = model(**batch.tensors())
    weights = batch.answer_weights
    words = (1 - batch.answer_labels).long()
    two_way = F.cross_entropy(torch.stack([margins, 0 * margins], 1), words, reduction="none")
    torch.testing.assert_close(loss, (two_way * weights).sum() / weights.sum())
    model.centre.fill_(0.75)
    torch.testing.assert_close(scores(model, every), margins - 0.75)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_vocabulary_scores_like_yes_no_and_counts_every_word(
    build: Callable[..., ReLLaX], batch: Batch, family: str
) -> None:
    two, whole = build(family).eval(), build(family, loss="vocabulary").eval()
    torch.testing.assert_close(scores(two, batch), scores(whole, batch), rtol=0, atol=1e-5)
    assert whole(**batch.tensors())[0] > two(**batch.tensors())[0] + 0.5


def test_instance_controls_replace_h(build: Callable[..., ReLLaX], batch: Batch) -> None:
    changed = replace(batch, instance=torch.randn(3, 5))
    const = build(instance_control="const").eval()
    assert torch.equal(scores(const, batch), scores(const, changed))
    permuted, plain = build(instance_control="permuted").eval(), build().eval()
    rolled = replace(batch, instance=batch.instance[[2, 0, 1]])
    assert torch.equal(scores(permuted, batch), scores(plain, rolled))
    assert not torch.equal(scores(permuted, batch), scores(plain, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_equal_gradients(
    build: Callable[..., ReLLaX], batch: Batch, family: str
) -> None:
    gradients = []
    for recompute in (False, True):
        model = build(family, dropout=0.2).train()
        if recompute:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        first, _ = model(**batch.tensors())
        second, _ = model(**replace(batch, instance=batch.instance * 2).tensors())
        (first + second).backward()
        groups = trainable_groups(model)
        gradients.append({n: p.grad for group in groups.values() for n, p in group.items()})
    assert len(gradients[0]) == 6 + 5 + (4 if family == "gpt2" else 8)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)
        assert gradient.abs().max() > 0, name


def test_training_touches_adapters_only_and_lowers_the_loss(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build(trained=False).train()
    groups = trainable_groups(model)
    assert list(groups) == ["factors", "interaction", "spa"]
    trained = [p for group in groups.values() for p in group.values()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss, _ = model(**batch.tensors())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    counts = {row.group: (row.trained, row.frozen) for row in parameter_counts(model)}
    total = sum(p.numel() for p in model.parameters())
    assert sum(sum(pair) for pair in counts.values()) == total
    assert counts["backbone"][0] == 0
    assert counts["factors"][1] == counts["interaction"][1] == counts["spa"][1] == 0


def test_gate_only_training_from_zero_factors_is_refused(build: Callable[..., ReLLaX]) -> None:
    with pytest.raises(CheckpointError, match="all zero"):
        build(trained=False, train_factors=False)


def test_answer_ids_outside_the_vocabulary_are_refused(
    backbones: dict[str, str], build: Callable[..., ReLLaX]
) -> None:
    config = build().config
    with pytest.raises(ConfigError, match="'yes' and 'no' as token ids below 60"):
        build_rellax(str(backbones["llama"]), config, {"yes": 3, "no": 60}, 6, 5)


def test_backbone_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load a causal LM"):
        load_backbone(f"{tmp_path}/absent")
