"""The LLM beside the recommender's logit, and gates that act on the question only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_models import FAMILIES

from rellax_ds.errors import ConfigError
from rellax_ds.model.rellax import trainable_groups
from rellax_ds.model.residual import LEAST

if TYPE_CHECKING:
    from collections.abc import Callable

    from rellax_ds.batch import Batch
    from rellax_ds.model.rellax import ReLLaX


def scores(model: ReLLaX, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch.tensors())[1]


def loss_of(model: ReLLaX, batch: Batch, history: bool) -> torch.Tensor:
    """The loss of the history's own answers, or of the targets."""
    weights = torch.full_like(batch.answer_weights, float(history))
    weights[batch.target_index] = float(not history)
    return model(**replace(batch, answer_weights=weights).tensors())[0]


def gradients(model: ReLLaX, loss: torch.Tensor) -> dict[str, float]:
    """Largest gradient of every group."""
    model.zero_grad()
    loss.backward()
    groups = trainable_groups(model)
    return {
        group: max(0.0 if p.grad is None else float(p.grad.abs().max()) for p in found.values())
        for group, found in groups.items()
    }


def test_residual_starts_as_the_recommender_to_the_bit(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build(residual="crm").eval()
    assert torch.equal(scores(model, batch), batch.crm_logits)
    model.llm_alone = True
    assert torch.equal(scores(model, batch), scores(build().eval(), batch))


def test_residual_adds_the_weighted_logit_of_the_llm(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build(residual="crm").eval()
    model.residual.blend.copy_(torch.tensor([0.75, 0.25, 0.125]))
    model.centre.fill_(0.5)
    alone = build().eval()
    alone.centre.fill_(0.5)
    expected = 0.75 * batch.crm_logits + 0.25 * scores(alone, batch) + 0.125
    torch.testing.assert_close(scores(model, batch), expected)


def test_targets_teach_the_llm_also_while_its_weight_is_zero(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build(residual="crm").train()
    of_target = gradients(model, loss_of(model, batch, history=False))
    assert min(of_target.values()) > 0
    assert set(of_target) == {"factors", "interaction", "spa"}, "the blend is not trained"
    model.residual.blend[1] = LEAST / 2
    assert gradients(model, loss_of(model, batch, history=False)) == of_target
    model.residual.blend[1] = 2 * LEAST
    assert gradients(model, loss_of(model, batch, history=False)) != of_target


def test_stacked_llm_is_trained_by_itself_and_scored_beside_the_recommender(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    stacked, alone, inside = build(residual="stacked"), build(), build(residual="crm")
    for model in (stacked, inside):
        model.residual.blend.copy_(torch.tensor([0.75, 0.25, 0.125]))
    found = [loss_of(model.train(), batch, history=False) for model in (stacked, alone, inside)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(scores(stacked.eval(), batch), scores(inside.eval(), batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_question_scope_reads_the_history_as_plain_lora_and_the_question_with_the_gates(
    build: Callable[..., ReLLaX], batch: Batch, family: str
) -> None:
    model = build(family, interaction_scope="question")
    of_history = gradients(model, loss_of(model, batch, history=True))
    assert of_history["interaction"] == 0, "the history's answers reach the gates"
    assert of_history["factors"] > 0
    assert gradients(model, loss_of(model, batch, history=False))["interaction"] > 0
    other = replace(batch, instance=torch.randn_like(batch.instance))
    assert loss_of(model, batch, True) == loss_of(model, other, True)
    assert loss_of(model, batch, False) != loss_of(model, other, False)


def test_question_scope_of_prompts_without_history_is_the_scope_of_the_prompt(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    whole = replace(batch, question_starts=torch.zeros(3, dtype=torch.int64))
    found = scores(build(interaction_scope="question").eval(), whole)
    torch.testing.assert_close(found, scores(build().eval(), batch), rtol=0, atol=1e-6)


def test_question_scope_recomputed_under_checkpointing_gives_equal_gradients(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    found = []
    for checkpointed in (False, True):
        model = build(interaction_scope="question", residual="crm").train()
        model.residual.blend[1] = 0.5
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(**batch.tensors())[0].backward()
        found.append([p.grad for group in trainable_groups(model).values() for p in group.values()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_question_scope_of_a_body_that_needs_padding_is_refused(
    build: Callable[..., ReLLaX], batch: Batch
) -> None:
    model = build(interaction_scope="question")
    model.backbone.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="interaction_scope question"):
        model(**batch.tensors())
