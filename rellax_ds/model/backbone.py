"""The frozen LLM: loading, and the two rows of its head that answer a question.

Any Hugging Face causal LM is used as it is; nothing is patched and no vocabulary is resized. Only
the answer positions ever meet the LM head, because full-sequence logits of a large vocabulary cost
more memory than the rest of a step. Under ZeRO-3 a weight is whole only while a module's forward
reads it, so every read of the backbone's weights happens in a module called inside the engine's
forward, or under `gathered`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from rellax_ds.errors import ConfigError
from rellax_ds.model.packed import pack_attention

if TYPE_CHECKING:
    from collections.abc import Iterable

Quantization = Literal["none", "nf4"]

_HEAD_CHANGES = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
}
"""Config fields by which some models change logits after the head, and their neutral values."""


def load_backbone(
    reference: str,
    dtype: torch.dtype = torch.float32,
    packing: bool = True,
    quantization: Quantization = "none",
) -> Any:
    """Load a causal LM, frozen, with attention for packed prompts and no KV cache.

    Args:
        reference: Local folder or Hugging Face name.
        dtype: Type of the weights.
        packing: Whether prompts are to lie end to end; else, and for a model that cannot, they are
            padded.
        quantization: `nf4` keeps the linear layers in 4 bits (bitsandbytes) and computes in
            `dtype`, in which they are also stored, so that ZeRO-3 can partition them.

    Returns:
        A transformers causal LM; under an active `HfDeepSpeedConfig` its parameters are
        partitioned.

    Raises:
        ConfigError: The reference cannot be loaded, bitsandbytes is missing, or the model changes
            its logits after the head.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            reference,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            **_quantized(quantization, dtype),
        )
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise ConfigError(
            f"model.backbone: cannot load a causal LM from '{reference}': {cause}"
        ) from error
    for name, neutral in _HEAD_CHANGES.items():
        value = getattr(model.config, name, None)
        if value is not None and value != neutral:
            raise ConfigError(
                f"model.backbone '{reference}' has {name} = {value}, which the answer head does "
                "not support; choose another backbone"
            )
    model.config.use_cache = False
    if packing:
        pack_attention(model)
    model.requires_grad_(False)
    return model


def _quantized(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is given besides."""
    if quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization is {quantization}, but bitsandbytes is not installed; install "
            "rellax-ds[quant] or set model.quantization=none"
        )
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    return {"quantization_config": config}


def gathered(parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Make ZeRO-3 parameters whole for reading; every rank must enter. Does nothing for ordinary
    parameters.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    context: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(partitioned)
    return context


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of a parameter, also while ZeRO-3 has it partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def embedding_rms(model: Any) -> float:
    """Root mean square of the entries of the input embeddings; a collective call under ZeRO-3."""
    weight = model.get_input_embeddings().weight
    with gathered([weight]):
        return float(weight.detach().float().pow(2).mean().sqrt())


class AnswerHead(nn.Module):
    """The LM head at answer positions: two rows of it for yes and no, or the whole vocabulary.

    It refers to the backbone's head without owning it, so parameters keep one name each. Being a
    module of its own bounds how long ZeRO-3 holds the gathered weight, which may be tied to the
    input embeddings.
    """

    def __init__(self, model: Any, yes: int, no: int) -> None:
        super().__init__()
        self._backbone = (model,)
        self.answers = (yes, no)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of yes and no, float32 [M, 2], for hidden states [M, H]."""
        head = self._backbone[0].get_output_embeddings()
        rows = list(self.answers)
        bias = getattr(head, "bias", None)
        weight = head.weight[rows].float()
        return F.linear(hidden.float(), weight, None if bias is None else bias[rows].float())


def vocabulary_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the whole vocabulary, float32 [M, V], for hidden states [M, H] at answer
    positions.
    """
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    return logits.float()
