"""ReLLaX as one module: the thing handed to the DeepSpeed engine, and all it computes in a step.

Forward embeds the ids, overwrites the soft-token slots with SPA vectors, computes every layer's
gate from the instance embedding, runs the frozen body with its adapters, and scores yes against no
at the answer positions. The loss is computed inside, because under ZeRO-3 weights are whole only
within the engine's forward. The recommender is not part of it: its outputs come with the batch.

A known caveat of dense supervision: h was computed from the history's labels too, so a gate driven
by h can answer the history's own questions without reading them. `model.interaction_scope:
question` shields them: M(h) acts from the target's question on, the history before it is plain LoRA
and neither sees h nor sends a gradient to the gates. Otherwise weigh such answers with care
(`train.history_weight`) and ablate with `model.instance_control`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from rellax_ds.errors import CheckpointError, ConfigError
from rellax_ds.kernels.rows import Rows
from rellax_ds.model import backbone as backbones
from rellax_ds.model import cflora
from rellax_ds.model.frozen import frozen_products
from rellax_ds.model.packed import run_body, takes_packed
from rellax_ds.model.residual import CRMResidual
from rellax_ds.model.spa import SoftPromptProjector, start_projector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rellax_ds.config import ModelConfig

GROUPS = ("factors", "interaction", "spa")
"""Groups of adapter parameters: A and B, the gates M(h), the projector."""

Loss = Literal["yes_no", "vocabulary"]


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of one group; `backbone` is the LLM."""

    group: str
    trained: int
    frozen: int


class ReLLaX(nn.Module):
    """A frozen LLM with CFLoRA and SPA that answers yes or no.

    Attributes:
        llm: The PEFT model around the backbone.
        spa: The soft-token projector, or None.
        config: The recipe's model section.
        answer_ids: Token ids of the two answers, keys `yes` and `no`.
        item_dim: Width of the recommender's item embeddings.
        instance_dim: Width of the instance embedding h.
        loss: Which loss `forward` computes.
        centre: Scalar buffer subtracted from z_yes - z_no; 0 until the training loop calibrates it.
        residual: What blends in the recommender's logit, or None.
        llm_alone: Score as if there were no residual, to fit centre and blend.
    """

    centre: torch.Tensor

    def __init__(
        self,
        llm: Any,
        spa: SoftPromptProjector | None,
        config: ModelConfig,
        answer_ids: Mapping[str, int],
        item_dim: int,
        instance_dim: int,
        loss: Loss = "yes_no",
    ) -> None:
        super().__init__()
        self.llm = llm
        self.spa = spa
        self.config = config
        self.answer_ids = {"yes": int(answer_ids["yes"]), "no": int(answer_ids["no"])}
        self.item_dim = item_dim
        self.instance_dim = instance_dim
        self.loss: Loss = loss
        self.residual = CRMResidual() if config.residual != "none" else None
        self.llm_alone = False
        self.head = backbones.AnswerHead(self.backbone, **self.answer_ids)
        self.register_buffer("centre", torch.zeros(()))
        self._reentrant = False

    @property
    def backbone(self) -> Any:
        """The causal LM inside the PEFT model."""
        return self.llm.base_model.model

    def forward(
        self,
        *,
        sample_ids: torch.Tensor | None = None,
        users: torch.Tensor | None = None,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        question_starts: torch.Tensor,
        slot_positions: torch.Tensor,
        slot_vectors: torch.Tensor,
        instance: torch.Tensor,
        crm_logits: torch.Tensor,
        answer_positions: torch.Tensor,
        answer_labels: torch.Tensor,
        answer_weights: torch.Tensor,
        target_index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and scores of a batch; the arguments are the tensors of `rellax_ds.batch.Batch`.

        Returns:
            The scalar loss, float32, averaged over the supervised answers by their weights; and
            each sample's logit at its target question, float32 [B], detached: the centred z_yes -
            z_no, or its blend with the recommender's. The probability of yes is its sigmoid.
        """
        embeddings = self._embed(input_ids, slot_positions, slot_vectors)
        rows = self._rows(lengths, question_starts)
        with self.llm.base_model.conditioned(self._controlled(instance), rows):
            hidden = run_body(self.backbone, embeddings, lengths)
        answers = hidden[answer_positions]
        if self.loss == "yes_no":
            scores = self.head(answers)
            margins = scores[:, 0] - scores[:, 1] - self.centre
            alone = self.llm_alone or (self.training and self.config.residual == "stacked")
            if self.residual is not None and not alone:
                margins = self.residual(margins, crm_logits, target_index)
            losses = F.binary_cross_entropy_with_logits(margins, answer_labels, reduction="none")
        else:
            logits = backbones.vocabulary_logits(self.backbone, answers)
            yes, no = self.answer_ids["yes"], self.answer_ids["no"]
            margins = logits[:, yes] - logits[:, no] - self.centre
            words = torch.where(answer_labels > 0.5, yes, no)
            losses = F.cross_entropy(logits, words, reduction="none")
        loss = (losses * answer_weights).sum() / answer_weights.sum()
        return loss, margins[target_index].detach()

    def enable_gradient_checkpointing(self, reentrant: bool = False) -> None:
        """Recompute layer activations in the backward pass.

        A recomputation runs after the forward has ended: the tuner gives it the gates of that
        forward, and the choice of products, which saves other tensors, is made again here.

        Args:
            reentrant: torch's older form, which runs a backward pass of its own and needs an input
                with a gradient: the embeddings get one.
        """
        self._reentrant = reentrant
        if reentrant:
            self.llm.base_model.activation_checkpointing_enable({"use_reentrant": True})
            return

        def again() -> tuple[Any, Any]:
            return contextlib.nullcontext(), frozen_products()

        self.llm.base_model.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": again}
        )

    def _embed(
        self,
        input_ids: torch.Tensor,
        slot_positions: torch.Tensor,
        slot_vectors: torch.Tensor,
    ) -> torch.Tensor:
        embeddings: torch.Tensor = self.backbone.get_input_embeddings()(input_ids)
        if self.spa is None:
            return embeddings.requires_grad_() if self._reentrant else embeddings
        tokens = self.spa(slot_vectors).to(embeddings.dtype)
        return embeddings.index_put((slot_positions,), tokens)

    def _rows(self, lengths: torch.Tensor, question_starts: torch.Tensor) -> Rows | None:
        """Which gate each token has; None where batches are padded.

        With the scope of the question, a prompt's tokens before it belong to sample B, one past the
        last, which the tuner gives the identity.
        """
        packed = takes_packed(self.backbone)
        if self.config.interaction_scope == "prompt":
            return Rows.from_lengths(lengths.tolist()) if packed else None
        if not packed:
            raise ConfigError(
                f"model.interaction_scope question: {type(self.backbone).__name__} cannot take "
                "packed batches; use scope prompt"
            )
        runs, first, size = [], 0, len(lengths)
        for sample, (length, start) in enumerate(
            zip(lengths.tolist(), question_starts.tolist(), strict=True)
        ):
            runs += [(first, start, size), (first + start, length - start, sample)]
            first += length
        return Rows(runs, size + 1)

    def _controlled(self, instance: torch.Tensor) -> torch.Tensor:
        if self.config.instance_control == "const":
            return torch.zeros_like(instance)
        if self.config.instance_control == "permuted":
            return instance.roll(1, dims=0)
        return instance


def build_rellax(
    backbone_reference: str,
    model_config: ModelConfig,
    answer_ids: Mapping[str, int],
    item_dim: int,
    instance_dim: int,
    dtype: torch.dtype = torch.float32,
    loss: Loss = "yes_no",
) -> ReLLaX:
    """Load the backbone and put the recipe's adapters on it.

    Call it on every rank with the same seed, before `deepspeed.initialize` and, for ZeRO-3, with an
    `HfDeepSpeedConfig` alive.

    Args:
        backbone_reference: Local folder or Hugging Face name of the causal LM.
        model_config: The recipe's model section; a set `adapter` folder is where A, B, gates and
            SPA start from.
        answer_ids: Token ids of the answers, keys `yes` and `no`.
        item_dim: Width of the recommender's item embeddings.
        instance_dim: Width of the instance embedding h.
        dtype: Type of the backbone's weights; the adapters stay in float32.
        loss: `yes_no` for the two-way loss, `vocabulary` for cross entropy over all tokens.

    Returns:
        The model; only what the recipe trains requires gradients.

    Raises:
        ConfigError: The backbone or a target module cannot be used.
        CheckpointError: The starting adapter does not fit, or frozen factors leave the gates
            without a gradient.
    """
    model = assemble(
        backbone_reference, model_config, answer_ids, item_dim, instance_dim, dtype, loss
    )
    if model_config.adapter is not None:
        folder = Path(model_config.adapter)
        cflora.start_from(model.llm, folder)
        if model.spa is not None:
            start_projector(model.spa, folder)
    if not model_config.train_factors:
        _freeze_factors(model)
    return model


def assemble(
    backbone_reference: str,
    model_config: ModelConfig,
    answer_ids: Mapping[str, int],
    item_dim: int,
    instance_dim: int,
    dtype: torch.dtype = torch.float32,
    loss: Loss = "yes_no",
) -> ReLLaX:
    """Like `build_rellax`, with fresh adapters and everything of them trainable."""
    base = backbones.load_backbone(
        backbone_reference, dtype, model_config.packing, model_config.quantization
    )
    _check_answers(base, answer_ids)
    spa = None
    if model_config.spa:
        model_dim = base.get_input_embeddings().embedding_dim
        spa = SoftPromptProjector(item_dim, model_dim, model_config.spa_bottleneck)
        spa.reset_parameters(backbones.embedding_rms(base))
    llm = cflora.attach(base, model_config, instance_dim)
    return ReLLaX(llm, spa, model_config, answer_ids, item_dim, instance_dim, loss)


def adapter_parameters(model: ReLLaX) -> dict[str, dict[str, nn.Parameter]]:
    """All adapter parameters, trained or frozen, by group and then by their name in the model."""
    groups: dict[str, dict[str, nn.Parameter]] = {group: {} for group in GROUPS}
    for name, parameter in model.named_parameters():
        group = _group(name)
        if group is not None:
            groups[group][name] = parameter
    return groups


def trainable_groups(model: ReLLaX) -> dict[str, dict[str, nn.Parameter]]:
    """What the optimiser trains: group name to (parameter name to parameter); groups without any
    are left out.
    """
    trained = {
        group: {name: p for name, p in parameters.items() if p.requires_grad}
        for group, parameters in adapter_parameters(model).items()
    }
    return {group: parameters for group, parameters in trained.items() if parameters}


def parameter_counts(model: ReLLaX) -> list[ParameterCount]:
    """Trained and frozen parameters of the backbone and of every adapter group."""
    counts = {group: [0, 0] for group in ("backbone", *GROUPS)}
    for name, parameter in model.named_parameters():
        numel = int(getattr(parameter, "ds_numel", parameter.numel()))
        counts[_group(name) or "backbone"][0 if parameter.requires_grad else 1] += numel
    return [ParameterCount(group, trained, frozen) for group, (trained, frozen) in counts.items()]


def _group(name: str) -> str | None:
    if name.startswith("spa."):
        return "spa"
    if f".{cflora.CONTAINER}." in name:
        return "interaction"
    if ".lora_A." in name or ".lora_B." in name:
        return "factors"
    return None


def _check_answers(base: Any, answer_ids: Mapping[str, int]) -> None:
    size = base.config.get_text_config().vocab_size
    for word in ("yes", "no"):
        if not 0 <= int(answer_ids.get(word, -1)) < size:
            raise ConfigError(
                f"answer_ids must give 'yes' and 'no' as token ids below {size}, they are "
                f"{dict(answer_ids)}; rebuild the shards with this backbone's tokenizer"
            )


def _freeze_factors(model: ReLLaX) -> None:
    factors = adapter_parameters(model)["factors"]
    ups = {name: p for name, p in factors.items() if ".lora_B." in name}
    with backbones.gathered(ups.values()):
        zero = [name for name, p in ups.items() if not bool(p.detach().any())]
    if zero:
        raise CheckpointError(
            f"model.train_factors is false and {len(zero)} of {len(ups)} frozen B factors are all "
            f"zero (first: {zero[0]}), so their gates get no gradient; start from a trained "
            "adapter (model.adapter)"
        )
    for parameter in factors.values():
        parameter.requires_grad_(False)
