"""The projector: unseen items, starting size, bottleneck."""

from __future__ import annotations

import pytest
import torch

from rellax_ds.model.spa import SoftPromptProjector


def test_projector_gives_unseen_items_the_null_vector_and_trains_it() -> None:
    torch.manual_seed(0)
    projector = SoftPromptProjector(4, 8)
    projector.reset_parameters(0.1)
    vectors = torch.randn(3, 4)
    vectors[1] = 0
    tokens = projector(vectors)
    assert torch.equal(tokens[1], projector.null)
    assert not torch.equal(tokens[0], projector.null)
    tokens.sum().backward()
    assert torch.equal(projector.null.grad, torch.ones(8))


def test_projector_starts_at_the_size_of_word_embeddings() -> None:
    torch.manual_seed(0)
    projector = SoftPromptProjector(32, 64)
    projector.reset_parameters(0.05)
    rms = projector(torch.randn(500, 32)).pow(2).mean().sqrt().item()
    assert rms == pytest.approx(0.05, rel=0.1)
    assert projector.null.pow(2).mean().sqrt().item() == pytest.approx(0.05, rel=0.3)
    assert projector.input.bias.abs().max() == 0


def test_projector_without_slots_still_reaches_every_parameter() -> None:
    projector = SoftPromptProjector(4, 8, bottleneck=2)
    projector.reset_parameters(0.1)
    projector(torch.zeros(0, 4)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in projector.parameters())
    assert projector.output.weight.shape == (8, 2)
