"""How fast a training runs: rates, time spent waiting for data, memory, and MFU on known devices.

MFU (model FLOPs utilisation, after PaLM, arXiv 2204.02311, appendix B) is the arithmetic the model
needs, not what was executed, over what the devices could do at their dense bf16 peak. A frozen
backbone needs two thirds of a full fine-tuning's: its products are made once forward and once for
the gradient of their input, 2 FLOPs a weight and token each; gradients of weights are made for the
adapters only. Recomputed activations (gradient checkpointing) do not count, and neither does the
answer head, which sees a few positions of a prompt.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rellax_ds import runtime
from rellax_ds.model.rellax import parameter_counts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rellax_ds.model.rellax import ReLLaX

PEAK_BF16 = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090 D": 147e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s by the device's name, from the vendor's data sheets (half of the figure "with
sparsity"); the more particular name comes first.
"""

FIELDS = (
    "samples_per_second",
    "tokens_per_second",
    "data_wait_seconds",
    "data_wait_share",
    "peak_memory_bytes",
    "mfu",
)
"""What a step record says about speed: the fields that differ between two equal runs."""


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of a forward and backward pass, as sums over prompts.

    Attributes:
        per_token: For every token: the weights' products.
        per_pair: For every pair of a token and one it attends to, itself included: attention's, in
            all layers.
    """

    per_token: float
    per_pair: float

    @classmethod
    def of(cls, model: ReLLaX) -> ModelCost:
        """Count the body's weights and the factors A and B, also where ZeRO-3 has cut them; gates
        are made once a prompt, not once a token.
        """
        count = {found.group: found for found in parameter_counts(model)}
        factors = count["factors"]
        body = count["backbone"].frozen - sum(_lookups(model.backbone).values())
        text = model.backbone.config.get_text_config()
        heads = text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
        # Two products of `width` forward and four backward, 2 FLOPs a place.
        return cls(
            per_token=4.0 * (body + factors.frozen) + 6.0 * factors.trained,
            per_pair=12.0 * width * text.num_hidden_layers,
        )

    def flops(self, tokens: float, samples: float) -> float:
        """FLOPs for `tokens` in `samples` prompts of like length, as the prompts of a step are;
        attention is causal, so a prompt of L tokens has L (L + 1) / 2 pairs.
        """
        return self.per_token * tokens + self.per_pair * tokens * (tokens / samples + 1.0) / 2.0


class Throughput:
    """Times the steps of one rank and describes them.

    Attributes:
        waited: Seconds this step has waited for batches so far.
    """

    def __init__(self, model: ReLLaX, device: torch.device, world_size: int) -> None:
        """Measure steps of `world_size` ranks, each on a device like `device`."""
        self._cost = ModelCost.of(model)
        self._device = device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(name)
        self._peak = None if peak is None else peak * world_size
        self._world_size = world_size
        self._started = 0.0
        self.waited = 0.0

    def start(self) -> None:
        """Begin a step."""
        self._started, self.waited = time.monotonic(), 0.0

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, with the time it took to get each counted as waiting."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited += time.monotonic() - asked
            yield batch

    def describe(self, samples: int, tokens: float, waited: float) -> dict[str, float | None]:
        """The step's `FIELDS`; call it when the step is done.

        Args:
            samples: Prompts of the step, over all ranks.
            tokens: Their tokens, padding left out.
            waited: Seconds of waiting, summed over the ranks; the mean is shown.
        """
        seconds = max(time.monotonic() - self._started, 1e-9)
        waited /= self._world_size
        used = self._cost.flops(tokens, samples) / seconds
        return {
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "data_wait_seconds": waited,
            "data_wait_share": min(waited / seconds, 1.0),
            "peak_memory_bytes": self._peak_memory(),
            "mfu": None if self._peak is None else used / self._peak,
        }

    def _peak_memory(self) -> int:
        """Of this rank: allocated on the GPU, or resident on the CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return runtime.peak_memory_bytes()


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device, None when it is not in the table."""
    words = device_name.replace("-", " ").split()
    for name, peak in PEAK_BF16.items():
        if all(word in words for word in name.split()):
            return peak
    return None


def _lookups(backbone: Any) -> dict[int, int]:
    """Parameters of the embedding and of the head, tied or not: no product of the body."""
    modules = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
    weights = [module.weight for module in modules if module is not None]
    return {id(weight): int(getattr(weight, "ds_numel", weight.numel())) for weight in weights}
