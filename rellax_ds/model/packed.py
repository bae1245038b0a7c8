"""The frozen body over prompts laid end to end: no padding, and no sample sees another.

Everything in a transformer but attention works on one token, so a packed batch is one long row for
it. Attention is told where prompts end, through the extension point transformers has for it: where
flash-attention is at hand, its variable-length kernel; elsewhere torch's scaled dot product, prompt
by prompt, which takes the causal fast path and never builds a mask of the whole row. Models with a
body that cannot be cut this way (state-space layers, attention of their own) get padded batches
here and nobody else notices.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from rellax_ds import runtime
from rellax_ds.errors import ConfigError
from rellax_ds.model.frozen import frozen_products

if TYPE_CHECKING:
    from collections.abc import Sequence

SEGMENTS = "rellax_segments"
"""Name of prompt-by-prompt attention in transformers' table of attention functions."""

FLASH = "flash_attention_2"

_CUTTABLE = frozenset({"full_attention", "sliding_attention"})


def pack_attention(model: Any) -> None:
    """Let a causal LM attend to prompts laid end to end; a model that cannot is left as it is and
    gets padded batches, which is logged.

    Args:
        model: A transformers causal LM with torch's scaled-dot-product attention.
    """
    if not _cuttable(model):
        runtime.logger.info(
            "model: %s cannot attend to prompts laid end to end; batches are padded",
            type(model).__name__,
        )
        return
    if _flash_attention(model):
        model.set_attn_implementation(FLASH)
    else:
        _register()
        model.set_attn_implementation(SEGMENTS)


def takes_packed(model: Any) -> bool:
    """Whether `pack_attention` chose packed batches for this model."""
    return model.config._attn_implementation in (SEGMENTS, FLASH)


def run_body(model: Any, embeddings: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Hidden states after the final norm of each prompt by itself.

    Args:
        model: The causal LM, prepared by `pack_attention`.
        embeddings: Input embeddings [T, H] of the prompts, one after the other.
        lengths: int64 [B] on the CPU, tokens of each prompt.

    Returns:
        [T, H].
    """
    body = model.get_decoder()
    counts: list[int] = lengths.tolist()
    if not takes_packed(model):
        return _run_padded(body, embeddings, counts)
    device = embeddings.device
    positions = torch.cat([torch.arange(count) for count in counts]).to(device)
    arguments: dict[str, Any] = {"segments": tuple(counts)}
    if model.config._attn_implementation == FLASH:
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
        longest = max(counts)
        arguments = {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    with frozen_products():
        hidden: torch.Tensor = body(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            **arguments,
        )[0]
    return hidden[0]


def segmented_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment of one row, as transformers' `sdpa` computes it.

    Args:
        module: The attention layer.
        query: [1, heads, T, d]; `key` and `value` may have fewer heads.
        key: As above.
        value: As above.
        attention_mask: Unused, there is none.
        segments: Tokens of each prompt, sum T.
        sliding_window: A token sees at most so many tokens, itself included.
        **kwargs: Passed on: scaling, dropout.

    Returns:
        [1, T, heads, d] and no weights.

    Raises:
        ConfigError: The model does not hand `segments` on to its attention.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if segments is None:
        raise ConfigError(
            f"{type(module).__name__} was not told where prompts end, so its model cannot take "
            "packed batches; set model.packing to false"
        )
    kwargs.pop("is_causal", None)
    counts = list(segments)
    parts = zip(*(torch.split(part, counts, dim=2) for part in (query, key, value)), strict=True)
    outputs = []
    for q, k, v in parts:
        length = q.shape[2]
        mask = None
        if sliding_window is not None and length > sliding_window:
            places = torch.arange(length, device=q.device)
            behind = places[:, None] - places[None, :]
            mask = ((behind >= 0) & (behind < sliding_window))[None, None]
        output, _ = sdpa_attention_forward(
            module, q, k, v, mask, is_causal=mask is None and length > 1, **kwargs
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def _run_padded(body: Any, embeddings: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """A causal model never looks right, so right padding needs no mask: attention takes torch's
    causal fast path, and what is computed at padding is never read.
    """
    width = max(counts)
    ends = itertools.accumulate(counts)
    rows = [
        torch.nn.functional.pad(embeddings[end - count : end], (0, 0, 0, width - count))
        for end, count in zip(ends, counts, strict=True)
    ]
    with frozen_products():
        hidden: torch.Tensor = body(inputs_embeds=torch.stack(rows), use_cache=False)[0]
    return torch.cat([row[:count] for row, count in zip(hidden, counts, strict=True)])


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENTS, segmented_attention)


def _cuttable(model: Any) -> bool:
    """Whether every mixing of tokens goes through the attention function we can set."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return bool(model.is_backend_compatible()) and _CUTTABLE.issuperset(kinds)


def _flash_attention(model: Any) -> bool:
    from transformers.utils import is_flash_attn_2_available

    half = model.dtype in (torch.bfloat16, torch.float16)
    return half and torch.cuda.is_available() and bool(is_flash_attn_2_available())
