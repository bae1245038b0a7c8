from __future__ import annotations

import pytest

from rellax_ds.config import CRMConfig
from rellax_ds.crm.features import Interactions
from rellax_ds.testing import made_tables


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Interactions:
    """Few items and many users: interests can be learned within seconds."""
    folder = tmp_path_factory.mktemp("raw")
    return Interactions.of(made_tables(folder, num_users=300, num_items=24, num_events=6000))


@pytest.fixture(scope="session")
def sparse_log(tmp_path_factory: pytest.TempPathFactory) -> Interactions:
    """Many items and few users: some items never occur in training."""
    folder = tmp_path_factory.mktemp("raw")
    return Interactions.of(made_tables(folder, num_users=40, num_items=600, num_events=1200))


@pytest.fixture(scope="session")
def config() -> CRMConfig:
    return CRMConfig(
        history_length=12,
        embedding_dim=8,
        hidden_dim=16,
        batch_size=64,
        learning_rate=5e-3,
        weight_decay=0.0,
        max_epochs=4,
        patience=2,
    )
