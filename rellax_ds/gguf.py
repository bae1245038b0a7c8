"""One llama-architecture GGUF file to a Hugging Face model folder in float32.

transformers can read GGUF itself, but the model it returns counts as quantised (it can be neither
saved nor trained in 5.x) and its tokenizer loses the digit splitting of this family, so token ids
would differ from those the model was trained on. The folder written here is a plain checkpoint that
transformers 4.57 and 5.x load alike. Tensors stream from the mapped file to the safetensors file a
block of rows at a time, so the conversion never holds the model in memory.

The values are those of the quantised file: a 4-bit GGUF gives a dequantised 4-bit model, not the
original weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds.errors import AssetError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONVERTER_VERSION = 1
"""Raised whenever the files written from one GGUF change, so that cached folders are rebuilt."""

_ROWS_AT_ONCE = 4096
_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: its Hugging Face name and shape, and how to get its rows."""

    name: str
    shape: tuple[int, ...]
    source: Any
    heads: int | None

    def blocks(self) -> Iterator[np.ndarray]:
        """The tensor in float32, a block of rows at a time."""
        from gguf.quants import dequantize

        data, kind = self.source.data, self.source.tensor_type
        if self.heads is not None:
            # llama.cpp interleaves the two rotary halves of every head; transformers keeps them
            # apart.
            rows, columns = self.shape
            weight = dequantize(data, kind).reshape(self.heads, rows // self.heads // 2, 2, columns)
            yield weight.swapaxes(1, 2).reshape(self.shape)
            return
        for start in range(0, data.shape[0], _ROWS_AT_ONCE):
            yield dequantize(data[start : start + _ROWS_AT_ONCE], kind)


def convert(source: Path, target: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder.

    Args:
        source: GGUF file of architecture llama with a byte-level BPE tokenizer of the smollm kind.
        target: Existing empty folder; receives config.json, generation_config.json,
            model.safetensors (float32), tokenizer.json, tokenizer_config.json and, when the file
            carries one, chat_template.jinja.

    Raises:
        AssetError: The file is damaged, or is of a form this converter does not cover; names the
            field or tensor.
    """
    reader = _open(source)
    fields = dict(reader.fields)
    _require(source, fields, "general.architecture", "llama")
    _require(source, fields, "tokenizer.ggml.model", "gpt2")
    _require(source, fields, "tokenizer.ggml.pre", "smollm")
    config = _config(source, fields, tied=all(t.name != "output.weight" for t in reader.tensors))
    tensors = [_named(source, tensor, config) for tensor in reader.tensors]
    _check_complete(source, config, tensors)
    _write_json(target / "config.json", config)
    _write_json(
        target / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    _write_tokenizer(fields, config, target)
    try:
        _write_safetensors(tensors, target / "model.safetensors")
    except NotImplementedError as error:
        raise AssetError(f"{source}: {error}; use a file quantised another way") from error


def _open(source: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise AssetError(
            f"{source}: reading GGUF needs the gguf package; run `pip install rellax-ds[gguf]`"
        ) from error
    try:
        return GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise AssetError(
            f"{source}: not a whole GGUF file ({reason}); fetch or copy it again"
        ) from error


def _value(source: Path, fields: dict[str, Any], name: str, default: Any = None) -> Any:
    if name in fields:
        return fields[name].contents()
    if default is None:
        raise AssetError(f"{source}: field '{name}' is missing; use a complete GGUF file")
    return default


def _require(source: Path, fields: dict[str, Any], name: str, expected: str) -> None:
    found = _value(source, fields, name)
    if found != expected:
        raise AssetError(
            f"{source}: {name} is '{found}', this converter reads '{expected}' only; "
            "give the model as a Hugging Face folder instead"
        )


def _config(source: Path, fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    def llama(name: str, default: Any = None) -> Any:
        return _value(source, fields, f"llama.{name}", default)

    def token(name: str, default: Any = None) -> int:
        return int(_value(source, fields, f"tokenizer.ggml.{name}_token_id", default))

    hidden, heads = int(llama("embedding_length")), int(llama("attention.head_count"))
    head_dim = int(llama("attention.key_length", hidden // heads))
    rotary = int(llama("rope.dimension_count", head_dim))
    if rotary != head_dim:
        raise AssetError(
            f"{source}: llama.rope.dimension_count {rotary} differs from the head size {head_dim}; "
            "give the model as a Hugging Face folder instead"
        )
    if llama("rope.scaling.type", "none") != "none":
        raise AssetError(
            f"{source}: llama.rope.scaling.type '{llama('rope.scaling.type')}' is not covered; "
            "give the model as a Hugging Face folder instead"
        )
    theta = _exact(llama("rope.freq_base", 10000.0))
    eos = token("eos")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"].data),
        "hidden_size": hidden,
        "intermediate_size": int(llama("feed_forward_length")),
        "num_hidden_layers": int(llama("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(llama("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": int(llama("context_length")),
        "rms_norm_eps": _exact(llama("attention.layer_norm_rms_epsilon")),
        # Both spellings: 5.x reads rope_parameters, 4.57 the top-level key and silently falls back
        # to 10000 without it.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": token("bos"),
        "eos_token_id": eos,
        "pad_token_id": token("padding", eos),
        "dtype": "float32",
    }


def _exact(value: float) -> float:
    # The shortest decimal of the stored float32: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value)))


def _named(source: Path, tensor: Any, config: dict[str, Any]) -> _Tensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    block = _BLOCK.fullmatch(tensor.name)
    part = block.group(2) if block else ""
    if tensor.name in _TOP_NAMES:
        name = _TOP_NAMES[tensor.name]
    elif block and part in _BLOCK_NAMES:
        name = f"model.layers.{block.group(1)}.{_BLOCK_NAMES[part]}.weight"
    else:
        raise AssetError(
            f"{source}: tensor '{tensor.name}' has no place in a plain Llama; "
            "give the model as a Hugging Face folder instead"
        )
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return _Tensor(name, shape, tensor, heads.get(part))


def _check_complete(source: Path, config: dict[str, Any], tensors: list[_Tensor]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        expected.pop("lm_head.weight")
    found = {tensor.name: tensor.shape for tensor in tensors}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise AssetError(
                f"{source}: tensor '{name}' has shape {found.get(name)}, the file's own fields ask "
                f"for {expected.get(name)}; use another copy of the file"
            )


def _write_tokenizer(fields: dict[str, Any], config: dict[str, Any], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL_TOKEN, True), (_USER_DEFINED_TOKEN, False)):
        added = [token for token, found in zip(tokens, kinds, strict=True) if found == kind]
        tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t in added])
    tokenizer.save(str(target / "tokenizer.json"))
    named = {name: tokens[config[f"{name}_token_id"]] for name in ("bos", "eos", "pad")}
    if "tokenizer.ggml.unknown_token_id" in fields:
        named["unk"] = tokens[fields["tokenizer.ggml.unknown_token_id"].contents()]
    _write_json(
        target / "tokenizer_config.json",
        {
            # The one class name that 4.57 and 5.x both know; and no BOS is ever prepended.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": text for name, text in named.items()},
        },
    )
    if "tokenizer.chat_template" in fields:
        template = fields["tokenizer.chat_template"].contents()
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_safetensors(tensors: list[_Tensor], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + 4 * int(np.prod(tensor.shape))
        header[tensor.name] = {
            "dtype": "F32",
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for block in tensor.blocks():
                file.write(np.ascontiguousarray(block, dtype="<f4").data)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
