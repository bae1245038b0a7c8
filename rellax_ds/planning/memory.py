"""Bytes that one rank needs, term by term, as plain functions of sizes.

Nothing here looks at a device. What DeepSpeed keeps (shards, persistent parameters, optimiser
state) is arithmetic on the parameters and is checked against a real engine by
`benchmarks.zero_memory`; activations, the gather window and the context are predictions.
docs/planning.md lists which is which and where each formula comes from.

Legend: N ranks, e bytes of an element in the training's precision, T tokens of a micro-batch at
most.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rellax_ds.engine.ds_config import zero_stage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rellax_ds.planning.parameters import Decoder, ModelShape, Weight

GIB = 2**30
CONTEXT = 6 * GIB // 5
"""CUDA's context, cuBLAS workspaces and NCCL's buffers on one rank; a round figure."""

NF4_BLOCK = 64
"""Weights that share one float32 constant under nf4, without double quantisation."""

MOMENTS = MASTER = 4
"""Bytes of an element of one Adam moment, and of the float32 copy of a weight."""


@dataclass(frozen=True)
class Layout:
    """What the DeepSpeed JSON and the launch decide.

    Attributes:
        ranks: N.
        stage: ZeRO stage.
        element: e, 2 for bf16 and 4 for fp32.
        persistence: Parameters of at most this many elements stay whole on every rank.
        persistence_in_all: Most elements that stay whole, all parameters together.
        live: Elements that may be gathered at a time, with what is fetched ahead.
        bucket: Elements of the buffer in which gradients are reduced.
        contiguous: Whether that buffer is allocated whole.
        weights: Where sharded weights lie: `none` for the device, `cpu` or `nvme`.
        optimizer: Where gradients and optimiser state lie.
        weight_buffers: Host bytes that weights on nvme pass through.
        optimizer_buffers: Host buffers that its state passes through on the way from nvme.
        swapped: Elements of one of them, at most.
    """

    ranks: int
    stage: int
    element: int
    persistence: int = 100_000
    persistence_in_all: int = sys.maxsize
    live: int = 1_050_000_000
    bucket: int = 500_000_000
    contiguous: bool = True
    weights: str = "none"
    optimizer: str = "none"
    weight_buffers: int = 0
    optimizer_buffers: int = 0
    swapped: int = 10**9

    @classmethod
    def of(cls, resolved: dict[str, Any], ranks: int) -> Layout:
        """From what `resolve_ds_config` returned; absent keys have DeepSpeed's defaults."""
        zero, stage = resolved["zero_optimization"], zero_stage(resolved)
        element = 2 if resolved["bf16"]["enabled"] else 4
        weights = (zero.get("offload_param") or {}) if stage == 3 else {}
        optimizer = (zero.get("offload_optimizer") or {}) if stage else {}
        live = zero.get("stage3_max_live_parameters", 10**9)
        ahead = zero.get("stage3_prefetch_bucket_size", 5 * 10**7)
        buffered = weights.get("buffer_count", 5) * weights.get("buffer_size", 10**8) * element
        return cls(
            ranks=ranks,
            stage=stage,
            element=element,
            persistence=int(zero.get("stage3_param_persistence_threshold", 10**5)),
            persistence_in_all=int(zero.get("stage3_model_persistence_threshold", sys.maxsize)),
            live=int(live + ahead),
            bucket=int(zero.get("reduce_bucket_size", 5 * 10**8)),
            contiguous=bool(zero.get("contiguous_gradients", True)),
            weights=str(weights.get("device", "none")),
            optimizer=str(optimizer.get("device", "none")),
            weight_buffers=int(buffered) if weights.get("device") == "nvme" else 0,
            optimizer_buffers=int(optimizer.get("buffer_count", 4)),
            swapped=int(zero.get("sub_group_size", 10**9)),
        )

    def shared(self, stage: int) -> int:
        """Ranks among which a thing is divided that ZeRO divides from `stage` on."""
        return self.ranks if self.stage >= stage else 1


@dataclass(frozen=True)
class Load:
    """What one forward and backward pass is given.

    Attributes:
        tokens: T, of a micro-batch in training.
        eval_tokens: Of a batch in evaluation.
        answers: Supervised answers of a micro-batch.
        vocabulary_loss: Whether the loss needs logits of the whole vocabulary.
        checkpointing: Whether blocks are computed again in the backward pass.
        cuda: Whether the rank computes on a GPU.
    """

    tokens: int
    eval_tokens: int
    answers: int
    vocabulary_loss: bool
    checkpointing: bool
    cuda: bool


@dataclass(frozen=True)
class Term:
    """Bytes of one kind on one rank: on the device it computes on, in host memory, on nvme."""

    name: str
    device: int = 0
    host: int = 0
    nvme: int = 0


def terms(shape: ModelShape, layout: Layout, load: Load) -> list[Term]:
    """All terms of a rank; those that are zero everywhere are left out."""
    frozen = [w for w in shape.weights if not w.trained]
    trained = [w for w in shape.weights if w.trained]
    sharded = layout.shared(3)
    found = [
        _placed("frozen weights", weights_held(frozen, sharded, layout.element), layout.weights),
        Term("4-bit block constants", block_constants(shape.weights)),
        Term("4-bit layer unpacked", unpacked_layer(shape.weights, layout.element)),
        Term("persistent weights", persistent_weights(shape.weights, layout)),
        Term("gather window", gather_window(shape.weights, layout)),
        _placed("trained weights", weights_held(trained, sharded, layout.element), layout.weights),
        Term("weight buffers", host=layout.weight_buffers),
        _gradients(trained, layout),
        _optimizer(trained, layout),
        Term("reduce bucket", reduce_bucket(trained, layout)),
        _activations(shape.decoder, layout.element, load),
        Term("answer logits", answer_logits(shape.decoder, layout.element, load)),
        Term("CUDA and NCCL", CONTEXT if load.cuda else 0),
    ]
    return [term for term in found if term.device or term.host or term.nvme]


def elements(weight: Weight, element: int) -> int:
    """Elements in which a weight is stored: two 4-bit values a byte, packed in the training's
    type.
    """
    return -(-weight.numel // (2 * element)) if weight.quantised else weight.numel


def width(weight: Weight, element: int) -> int:
    """Bytes of one of them: adapters stay in float32 whatever the training's precision."""
    return element if weight.group == "backbone" else MASTER


def weights_held(weights: Iterable[Weight], ranks: int, element: int) -> int:
    """Bytes of weights divided among `ranks`; each is padded to a multiple of their number."""
    return sum(-(-elements(w, element) // ranks) * width(w, element) for w in weights)


def block_constants(weights: Iterable[Weight]) -> int:
    """Bytes of nf4's scales, float32, which ZeRO does not divide."""
    return sum(-(-w.numel // NF4_BLOCK) * 4 for w in weights if w.quantised)


def unpacked_layer(weights: Iterable[Weight], element: int) -> int:
    """Bytes of the largest 4-bit weight while it is used, in the training's precision."""
    return max((w.numel * element for w in weights if w.quantised), default=0)


def persistent(weights: Iterable[Weight], layout: Layout) -> set[str]:
    """Names of the parameters that ZeRO-3 keeps whole, by DeepSpeed's rule in the model's order."""
    names: set[str] = set()
    total = 0
    for weight in weights if layout.stage == 3 else ():
        size = elements(weight, layout.element)
        if size <= layout.persistence and size + total <= layout.persistence_in_all:
            names.add(weight.name)
            total += size
    return names


def persistent_weights(weights: Iterable[Weight], layout: Layout) -> int:
    """Bytes of whole parameters beside their shards; one rank's shard is the whole already."""
    if not _gathers(layout):
        return 0
    listed = list(weights)
    names = persistent(listed, layout)
    return weights_held((w for w in listed if w.name in names), 1, layout.element)


def gather_window(weights: Iterable[Weight], layout: Layout) -> int:
    """Most bytes of gathered weights: what may be live, at least the largest module's own
    parameters, at most all that is not persistent.
    """
    if not _gathers(layout):
        return 0
    listed = list(weights)
    names = persistent(listed, layout)
    gathered = [w for w in listed if w.name not in names]
    whole = weights_held(gathered, 1, layout.element)
    return min(max(layout.live * layout.element, largest_module(gathered, layout.element)), whole)


def largest_module(weights: Iterable[Weight], element: int) -> int:
    """Bytes of the largest module's own parameters, which are gathered together."""
    modules: defaultdict[str, int] = defaultdict(int)
    for weight in weights:
        modules[weight.module] += elements(weight, element) * width(weight, element)
    return max(modules.values(), default=0)


def gradients(trained: Iterable[Weight], layout: Layout) -> int:
    """Bytes of accumulated gradients and of the float32 copy Adam is given."""
    numel = sum(-(-w.numel // layout.shared(2)) for w in trained)
    copied = layout.stage > 0 or layout.element < MASTER
    return numel * (layout.element + (MASTER if copied else 0))


def optimizer_state(trained: Iterable[Weight], layout: Layout) -> int:
    """Bytes of Adam's two moments and of the float32 weights, which ZeRO keeps apart from the
    weights even in fp32.
    """
    numel = sum(-(-w.numel // layout.shared(1)) for w in trained)
    apart = layout.stage > 0 or layout.element < MASTER
    return numel * (2 * MOMENTS + (MASTER if apart else 0))


def reduce_bucket(trained: Iterable[Weight], layout: Layout) -> int:
    """Bytes of the buffer in which whole gradients wait for their reduction."""
    numel = sum(w.numel for w in trained)
    whole = layout.contiguous and layout.stage > 0
    return (layout.bucket if whole else min(layout.bucket, numel)) * layout.element


def block_saved(decoder: Decoder, element: int) -> int:
    """Bytes a token leaves in one block for its backward pass, the linear layers being frozen.

    A frozen linear layer keeps nothing but its weight. The norms keep float32 inputs, attention
    keeps q, k, v and its output, the gated MLP keeps gate, activation and up, and adapted layers
    whose A trains keep their input.
    """
    kept = 2 * decoder.query + 2 * decoder.key_value + 3 * decoder.intermediate
    return 4 * decoder.normed + element * (kept + decoder.adapted // decoder.layers)


def activations(decoder: Decoder, element: int, tokens: int, checkpointing: bool) -> int:
    """Bytes of activations at the start of the backward pass, and what it works with in a block."""
    block = block_saved(decoder, element)
    blocks = decoder.layers * block
    if checkpointing:
        blocks = decoder.layers * element * decoder.hidden + block
    ends = (2 * element + 4) * decoder.hidden
    workspace = 3 * element * decoder.intermediate + 12 * decoder.hidden
    return tokens * (blocks + ends + workspace)


def evaluation(decoder: Decoder, element: int, tokens: int) -> int:
    """Bytes of activations of a forward pass that keeps nothing."""
    return tokens * element * (4 * decoder.hidden + 3 * decoder.intermediate)


def answer_logits(decoder: Decoder, element: int, load: Load) -> int:
    """Bytes of hidden states and logits at the supervised answers, the only ones computed: two
    logits each, or the vocabulary's with a float32 copy, its log-softmax and its gradient.
    """
    states = load.answers * decoder.hidden * (element + 4)
    logits = (element + 12) * decoder.vocabulary if load.vocabulary_loss else 16
    return states + load.answers * logits


def total(found: Iterable[Term]) -> Term:
    """The sum."""
    listed = list(found)
    return Term(
        "total",
        sum(term.device for term in listed),
        sum(term.host for term in listed),
        sum(term.nvme for term in listed),
    )


def _gathers(layout: Layout) -> bool:
    """Whether a whole weight is a copy: one rank that holds all of it only looks at it."""
    return layout.stage == 3 and (layout.ranks > 1 or layout.weights != "none")


def _placed(name: str, size: int, device: str) -> Term:
    if device == "none":
        return Term(name, device=size)
    return Term(name, host=size) if device == "cpu" else Term(name, nvme=size)


def _gradients(trained: list[Weight], layout: Layout) -> Term:
    size = gradients(trained, layout)
    return Term("gradients", size) if layout.optimizer == "none" else Term("gradients", host=size)


def _optimizer(trained: list[Weight], layout: Layout) -> Term:
    size = optimizer_state(trained, layout)
    if layout.optimizer != "nvme":
        return _placed("Adam state", size, layout.optimizer)
    part = min(sum(-(-w.numel // layout.shared(1)) for w in trained), layout.swapped)
    return Term("Adam state", host=layout.optimizer_buffers * part * MASTER, nvme=size)


def _activations(decoder: Decoder, element: int, load: Load) -> Term:
    training = activations(decoder, element, load.tokens, load.checkpointing)
    scoring = evaluation(decoder, element, load.eval_tokens)
    if scoring > training:
        return Term("activations in evaluation", scoring)
    return Term("activations", training)
