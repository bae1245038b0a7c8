"""Tiny random causal LMs of every kind the PEFT method is tried on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 60


def tiny_model(family: str) -> Any:
    torch.manual_seed(3)
    llama = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=True))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**llama, tie_word_embeddings=False))
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**llama, head_dim=8))
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**llama, sliding_window=6))
    if family == "gemma":
        return GemmaForCausalLM(GemmaConfig(**llama, head_dim=8))
    gpt2 = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(gpt2)


TARGETS = {"llama": ("q_proj", "v_proj"), "qwen2": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}
FAMILIES = {
    "llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "o_proj", "up_proj"],
    "mistral": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gemma": ["q_proj", "v_proj", "gate_proj"],
}
"""Every kind of backbone the PEFT method is tried on, and layers of it to adapt."""
