"""A few valid prompts watched through a training: what they say, and what the model thinks of them.

The same prompts are shown at every valid score, spread evenly over the split's sample ids, so their
probabilities can be read as curves. `scored.jsonl` is the truth: one line a prompt, then one line a
prompt and score; sinks get the same rows as a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds import metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rellax_ds.shards.read import Sample
    from rellax_ds.training.score import Scores

SHOWN = 16
"""Most prompts that are watched."""

COLUMNS = ("step", "sample", "label", "probability", "prompt")


class ScoredPrompts:
    """The watched prompts of one training."""

    def __init__(self, samples: Sequence[Sample], backbone: str) -> None:
        """Describe the prompts.

        Args:
            samples: The prompts, from the valid split.
            backbone: What `from_pretrained` takes; where no `tokenizer.json` of it is on this
                machine, prompts are shown as token ids.
        """
        texts = _texts(samples, backbone)
        self._prompts = {sample.id: text for sample, text in zip(samples, texts, strict=True)}
        self._facts = {sample.id: sample.facts for sample in samples}

    def prompts(self) -> list[dict[str, Any]]:
        """A record for each prompt: its text and what the shard says about it."""
        return [
            {"event": "prompt", "step": 0, "sample": sample, "prompt": text}
            | {key: value for key, value in self._facts[sample].items() if key != "sample"}
            for sample, text in self._prompts.items()
        ]

    def rows(self, step: int, scores: Scores) -> list[dict[str, Any]]:
        """A row of `COLUMNS` for each prompt, from the scores of the whole split."""
        places = np.searchsorted(scores.ids, list(self._prompts))
        probabilities = metrics.sigmoid(scores.logits[places])
        return [
            {
                "step": step,
                "sample": sample,
                "label": int(scores.labels[place]),
                "probability": float(probability),
                "prompt": text,
            }
            for (sample, text), place, probability in zip(
                self._prompts.items(), places, probabilities, strict=True
            )
        ]


def _texts(samples: Sequence[Sample], backbone: str) -> list[str]:
    """The prompts without their soft tokens; a tokenizer's file is read, which is quick."""
    path = Path(backbone) / "tokenizer.json"
    if not path.is_file():
        return [" ".join(map(str, sample.tokens[0].tolist())) for sample in samples]
    from tokenizers import Tokenizer

    words = [sample.tokens[0][sample.tokens[1] < 0].tolist() for sample in samples]
    return list(Tokenizer.from_file(str(path)).decode_batch(words, skip_special_tokens=False))
