"""Parameters counted on the meta device, against public counts and against real tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from benchmarks.saved import saved_bytes
from rellax_ds.config import ModelConfig
from rellax_ds.errors import AssetError, ConfigError
from rellax_ds.kernels.rows import Rows
from rellax_ds.model import cflora
from rellax_ds.model.packed import pack_attention, run_body
from rellax_ds.planning.memory import block_saved
from rellax_ds.planning.parameters import CONFIGS, read_config, shape_of

if TYPE_CHECKING:
    from pathlib import Path

PUBLIC = {
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "lmsys/vicuna-13b-v1.5": 13_015_864_320,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "smollm2-135m-instruct": 134_515_008,
}


@pytest.mark.parametrize("backbone", sorted(PUBLIC))
def test_shipped_config_has_the_public_number_of_parameters(backbone: str) -> None:
    config, _ = read_config(backbone)
    shape = shape_of(config, ModelConfig(), 64, 256)
    assert shape.count("backbone", trained=False) == PUBLIC[backbone]
    assert {path.stem.replace("--", "/") for path in CONFIGS.glob("*.json")} == set(PUBLIC)


def test_adapter_counts_are_the_published_arithmetic() -> None:
    config, _ = read_config("lmsys/vicuna-7b-v1.5")
    shape = shape_of(config, ModelConfig(), 64, 256)
    assert shape.count("factors", trained=True) == 64 * 8 * (4096 + 4096)
    gate = 2 * 256 + (256 + 1) * 128 + (128 + 1) * 64
    assert shape.count("interaction", trained=True) == 64 * gate
    assert shape.count("spa", trained=True) == (64 + 1) * 4096 + (4096 + 1) * 4096 + 4096


def test_factors_held_fixed_are_counted_as_frozen(tmp_path: Path) -> None:
    config, _ = read_config("smollm2-135m-instruct")
    settings = ModelConfig(train_factors=False, adapter=tmp_path, quantization="nf4")
    shape = shape_of(config, settings, 32, 64)
    assert (shape.count("factors", trained=True), shape.decoder.adapted) == (0, 0)
    assert shape.count("factors", trained=False) == 460_800
    packed = {w.name.rpartition(".layers.")[2] for w in shape.weights if w.quantised}
    assert "0.self_attn.q_proj.base_layer.weight" in packed
    assert "0.mlp.down_proj.weight" in packed
    assert not {w.name for w in shape.weights if w.quantised and "embed" in w.name}


def test_local_config_wins_over_the_shipped_one(tmp_path: Path) -> None:
    tiny_model("qwen3").config.save_pretrained(tmp_path)
    config, source = read_config(str(tmp_path))
    assert (config.hidden_size, source) == (32, "its local config")
    assert read_config("Qwen/Qwen3-8B")[1] == "the config shipped with rellax-ds"


def test_backbone_without_a_config_names_those_that_have_one() -> None:
    with pytest.raises(AssetError, match=r"nobody/nothing.*config.json.*Qwen/Qwen3-8B"):
        read_config("nobody/nothing")


def test_target_module_that_is_not_there_is_refused() -> None:
    config, _ = read_config("smollm2-135m-instruct")
    with pytest.raises(ConfigError, match=r"target_modules.*'w_pack'"):
        shape_of(config, ModelConfig(target_modules=("w_pack",)), 32, 64)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_leaves_for_its_backward_pass_what_the_formula_says(
    family: str, dtype: torch.dtype
) -> None:
    """On a block so wide that what the formula leaves out (r columns, statistics) is small."""
    saved = {}
    for layers in (1, 2):
        config = tiny_model(family).config
        config.update({"hidden_size": 256, "intermediate_size": 640, "head_dim": 32})
        config.update({"num_attention_heads": 8, "num_key_value_heads": 2})
        config.update({"num_hidden_layers": layers})
        if hasattr(config, "sliding_window"):
            config.sliding_window = None
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * layers
        settings = ModelConfig(rank=2, spa=False)
        shape = shape_of(config, settings, 6, 5)
        saved[layers] = _saved(type(tiny_model(family))(config), settings, dtype)
    per_token = (saved[2] - saved[1]) / 64
    assert per_token == pytest.approx(block_saved(shape.decoder, dtype.itemsize), rel=0.03)


def _saved(base: nn.Module, settings: ModelConfig, dtype: torch.dtype) -> int:
    pack_attention(base)
    llm = cflora.attach(base.requires_grad_(False), settings, 5).to(dtype).train()
    inputs = torch.randn(64, 256, dtype=dtype, requires_grad=True)
    lengths = torch.tensor([40, 24])

    def run() -> torch.Tensor:
        with llm.base_model.conditioned(torch.randn(2, 5), Rows.from_lengths(lengths.tolist())):
            return run_body(llm.base_model.model, inputs, lengths)

    return saved_bytes(run, llm.parameters())
