"""The whole model: what reaches a logit, what does not, and what is trained."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_models import FAMILIES, TARGETS
from torch.nn import functional as F

from rellax_ds.errors import CheckpointError, ConfigError
from rellax_ds.model.backbone import load_backbone
from rellax_ds.model.packed import takes_packed
from rellax_ds.model.rellax import build_rellax, parameter_counts, trainable_groups

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rellax_ds.batch import Batch
    from rellax_ds.model.rellax import ReLLaX


def scores(model: ReLLaX, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch.tensors())[1]


def take(batch: Batch, row: int) -> Batch:
    """One sample of a batch."""
    stop = int(batch.lengths[: row + 1].sum())
    start = stop - int(batch.lengths[row])
    slots, answers = (
        (positions >= start) & (positions < stop)
        for positions in (batch.slot_positions, batch.answer_positions)
    )
    first = int(answers.nonzero()[0])
    return replace(
        batch,
        sample_ids=batch.sample_ids[[row]],
        users=batch.users[[row]],
        input_ids=batch.input_ids[start:stop],
        lengths=batch.lengths[[row]],
        question_starts=batch.question_starts[[row]],
        slot_positions=batch.slot_positions[slots] - start,
        slot_vectors=batch.slot_vectors[slots],
        instance=batch.instance[[row]],
        crm_logits=batch.crm_logits[[row]],
        answer_positions=batch.answer_positions[answers] - start,
        answer_labels=batch.answer_labels[answers],
        answer_weights=batch.answer_weights[answers],
        target_index=batch.target_index[[row]] - first,
    )


def gradients_of(model: ReLLaX, *batches: Batch) -> dict[str, torch.Tensor]:
    """Gradients of the loss of `batches` together, weighed as in one batch."""
    weights = [batch.answer_weights.sum() for batch in batches]
    for batch, weight in zip(batches, weights, strict=True):
        (model(**batch.tensors())[0] * weight / sum(weights)).backward()
    groups = trainable_groups(model).values()
    return {name: p.grad for group in groups for name, p in group.items() if p.grad is not None}


@pytest.mark.parametrize("family", TARGETS)
def test_scores_equal_the_full_forward_of_the_causal_lm(
    build: Callable[..., ReLLaX], batch: Batch, family: str
) -> None:
    model, stock = build(family).eval(), build(family, packing=False).eval()
    for row, score in enumerate(scores(model, batch)):
        one = take(batch, row)
        embeddings = stock.backbone.get_input_embeddings()(one.input_ids)
        for slot, position in enumerate(one.slot_positions):
            embeddings[position] = stock.spa(one.slot_vectors[[slot]])[0]
        with torch.no_grad(), stock.llm.base_model.conditioned(one.instance):
            logits = stock.llm(inputs_embeds=embeddings[None]).logits[0]
        answer = logits[one.answer_positions[one.target_index[0]]]
        torch.testing.assert_close(score, answer[11] - answer[12], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_padded_and_one_by_one_give_equal_scores_and_gradients(
    build: Callable[..., ReLLaX], batch: Batch, family: str
) -> None:
    packed, padded, single = build(family), build(family, packing=False), build(family)
    assert takes_packed(packed.backbone)
    assert not takes_packed(padded.backbone)
    one_by_one = [take(batch, row) for row in range(batch.size)]
    alone = torch.cat([scores(single, one) for one in one_by_one])
    torch.testing.assert_close(scores(packed, batch), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores(padded, batch), alone, rtol=0, atol=1e-5)
    assert alone.std() > 1e-2
    expected = gradients_of(single, *one_by_one)
    for model in (packed, padded):
        found = gradients_of(model, batch)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_body_that_mixes_tokens_its_own_way_gets_padded_batches(
    backbones: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(backbones["qwen3"], tmp_path / "hybrid")
    path = tmp_path / "hybrid" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"layer_types": ["full_attention", "chunked_attention"]}))
    with caplog.at_level(logging.INFO, "rellax_ds"):
        assert not takes_packed(load_backbone(str(tmp_path / "hybrid")))
    assert "batches are padded" in caplog.text


def test_attention_that_is_not_told_where_prompts_end_is_an_error(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build(interaction="identity")
    with pytest.raises(ConfigError, match=r"LlamaAttention .*model\.packing"):
        model.backbone(input_ids=batch.input_ids[None])


def test_scores_of_a_bfloat16_backbone_stay_near_float32(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    full, half = build().eval(), build(dtype=torch.bfloat16).eval()
    assert half.backbone.get_output_embeddings().weight.dtype == torch.bfloat16
    assert next(iter(trainable_groups(half)["factors"].values())).dtype == torch.float32
    torch.testing.assert_close(scores(half, batch), scores(full, batch), rtol=0, atol=0.15)


def test_scores_answer_to_their_own_instance_only(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build().eval()
    other = batch.instance.clone()
    other[1] = torch.randn(5)
    change = (scores(model, batch) - scores(model, replace(batch, instance=other))).abs()
    assert change[[0, 2]].max() == 0
    assert change[1] > 1e-3


def test_scores_answer_to_their_own_slots_only(build: Callable[..., ReLLaX], batch: Batch) -> None:
    model = build().eval()
    before = scores(model, batch)
    vectors = batch.slot_vectors.clone()
    vectors[0] += 1.0
    change = (before - scores(model, replace(batch, slot_vectors=vectors))).abs()
    assert change[0] > 1e-4
    assert change[[1, 2]].max() == 0
    ids = batch.input_ids.clone()
    ids[batch.slot_positions] = 13
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


@pytest.mark.parametrize("family", TARGETS)
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


@pytest.mark.parametrize("family", TARGETS)
def test_gradient_checkpointing_gives_equal_gradients(
    build: Callable[..., ReLLaX], batch: Batch, family: str
) -> None:
    gradients = []
    for recompute in (None, False, True):
        model = build(family, dropout=0.2).train()
        if recompute is not None:
            model.enable_gradient_checkpointing(reentrant=recompute)
        torch.manual_seed(1)
        first, _ = model(**batch.tensors())
        second, _ = model(**replace(batch, instance=batch.instance * 2).tensors())
        (first + second).backward()
        groups = trainable_groups(model)
        gradients.append({n: p.grad for group in groups.values() for n, p in group.items()})
    assert len(gradients[0]) == 6 + 5 + (4 if family == "gpt2" else 8)
    for name, gradient in gradients[0].items():
        for again in gradients[1:]:
            torch.testing.assert_close(again[name], gradient, rtol=0, atol=1e-6)
        assert gradient.abs().max() > 0, name


def test_reentrant_checkpointing_reaches_factors_that_have_neither_gates_nor_soft_tokens(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    gradients = []
    for recompute in (False, True):
        model = build(interaction="identity", spa=False).train()
        if recompute:
            model.enable_gradient_checkpointing(reentrant=True)
        gradients.append(gradients_of(model, batch))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


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


def test_four_bit_backbone_trains_its_adapters(build: Callable[..., ReLLaX], batch: Batch) -> None:
    pytest.importorskip("bitsandbytes")
    model, whole = build(quantization="nf4").train(), build().train()
    assert type(model.backbone.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    loss, _ = model(**batch.tensors())
    torch.testing.assert_close(loss, whole(**batch.tensors())[0], rtol=0, atol=0.5)
    assert all(float(g.abs().max()) > 0 for g in gradients_of(model, batch).values())


def test_four_bit_backbone_without_bitsandbytes_names_the_extra(
    build: Callable[..., ReLLaX], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rellax_ds.model.backbone.importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"rellax-ds\[quant\]"):
        build(quantization="nf4")
