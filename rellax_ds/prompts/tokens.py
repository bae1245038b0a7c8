"""The tokenizer as the prompt builder needs it: content, control text, answers and the wrapper.

Two encoders are made from one tokenizer. *Content* (titles and the template's wording) is never
read as control text: `<|im_end|>` in a title becomes ordinary tokens, so a prompt holds exactly the
control tokens its wrapper put there. *Control* text is the tokenizer's own chat template, rendered
around a sentinel and cut there, so user content is never rendered by it or searched in it.

What follows a slot or a control token is a *continuation*: it is tokenised behind a token of our
own, and so exactly as the tokenizer treats text behind any added token, without the blank that many
tokenizers put before the first word of a text.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rellax_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_SENTINEL = "RELLAXCONTENTHERE"
_SLOT_TEXT = "~"
_GUARD = "\ufdd0\ufdd1\ufdd0"
"""Text of our own added token: noncharacters, which text for interchange never holds."""


@dataclass(frozen=True)
class AnswerIds:
    """Token ids of the two answers at one place; each is a single token."""

    yes: int
    no: int


@dataclass(frozen=True)
class Wrapper:
    """What stands around the content of a prompt.

    Attributes:
        prefix: Ids before the content.
        suffix: Ids after it.
        tail: Text of the suffix; empty without a chat template.
        blank: Whether an answer keeps its leading blank after the suffix.
        opening: Ids up to the last control token of the prefix.
        lead: Ordinary text between that token and the content.
        trail: Ordinary text between the content and the suffix's first control token.
        closing: Ids from that token on.
        before: Text of the whole prefix, with its control tokens.
        starts: Whether no control token of the prefix's text precedes the content.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    tail: str
    blank: bool
    opening: tuple[int, ...] = ()
    lead: str = ""
    trail: str = ""
    closing: tuple[int, ...] = ()
    before: str = ""
    starts: bool = False


class PromptTokens:
    """Token ids for prompts, from one tokenizer.

    Attributes:
        digest: sha256 over the tokenizer's vocabulary, rules and chat template.
        slot_id: Id that stands in a soft token's place until the model overwrites its embedding:
            an existing one, so that the vocabulary is never resized.
        control_ids: Ids of added tokens (chat markers and the like); `content` never yields one.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        """Wrap a fast tokenizer; `name` is for messages.

        Raises:
            ConfigError: The tokenizer is not a fast one.
        """
        from tokenizers import AddedToken

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(f"tokenizer {name}: needs a tokenizer.json (a fast tokenizer)")
        self.name = name
        self._tokenizer = tokenizer
        self._control_encoder = _plain_copy(backend)
        self._content_encoder = _plain_copy(backend)
        self._content_encoder.encode_special_tokens = True
        self._content_encoder.add_tokens([AddedToken(_GUARD, normalized=False, special=False)])
        self._guard_id = int(self._content_encoder.token_to_id(_GUARD))
        self._added = {str(token): id_ for token, id_ in tokenizer.get_added_vocab().items()}
        self.control_ids = frozenset(self._added.values())
        template = tokenizer.chat_template
        identity = f"{self._control_encoder.to_str()}\x1f{template}"
        self.digest = hashlib.sha256(identity.encode()).hexdigest()
        self.slot_id = self.content(_SLOT_TEXT)[-1]

    def content(self, text: str) -> list[int]:
        """Ids of a text in which no control token is recognised."""
        return self._encode([text])[0]

    def continued(
        self, texts: Sequence[str], before: str = "", *, start: bool = False
    ) -> list[list[int]]:
        """Ids of texts that stand inside a prompt, in which no control token is recognised.

        Args:
            texts: Each is tokenised on its own.
            before: Text that precedes them and is cut off again.
            start: The text with `before` begins the prompt; otherwise a slot or a control token
                precedes it.
        """
        guard = "" if start else _GUARD
        full = self._encode([guard + before + text for text in texts])
        if not before:
            return [ids if text else [] for ids, text in zip(full, texts, strict=True)]
        (head,) = self._encode([guard + before])
        fresh = [n for n, ids in enumerate(full) if ids[: len(head)] != head]
        found = [ids[len(head) :] for ids in full]
        # The text merges with what precedes it: there is nothing to cut, take it on its own.
        alone = self._encode([_GUARD + texts[n] for n in fresh])
        for n, ids in zip(fresh, alone, strict=True):
            found[n] = ids
        return found

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._content_encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        rows: list[list[int]] = [encoding.ids for encoding in encodings]
        for n, row in enumerate(rows):
            if not self.control_ids.isdisjoint(row):
                rows[n] = self._without_control(texts[n], row)
        return [[id_ for id_ in row if id_ != self._guard_id] for row in rows]

    def _without_control(self, text: str, ids: list[int]) -> list[int]:
        """An added token that is not marked special is recognised even in content: part it after
        its first character, so that neither side is the token.
        """
        while not self.control_ids.isdisjoint(ids):
            found = [token for token in self._added if len(token) > 1 and token in text]
            if not found:
                break
            cut = min(text.index(token) for token in found) + 1
            text = text[:cut] + _GUARD + text[cut:]
            ids = self._content_encoder.encode(text, add_special_tokens=False).ids
        return ids

    def control(self, text: str) -> list[int]:
        """Ids of a text in which control tokens are recognised."""
        ids: list[int] = self._control_encoder.encode(text, add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def opening(self) -> tuple[int, ...]:
        """Ids the tokenizer puts before any text (a BOS token, or nothing)."""
        bare = self._control_encoder.encode("a", add_special_tokens=False).ids
        full = self._control_encoder.encode("a", add_special_tokens=True).ids
        starts = (n for n in range(len(full)) if full[n : n + len(bare)] == bare)
        start = next(starts, 0)
        return tuple(full[:start])

    def wrapper(self, chat: bool) -> Wrapper:
        """What stands around the content: the chat template's parts, or the opening ids alone.

        Args:
            chat: Use the tokenizer's chat template if it has one.

        Raises:
            ConfigError: The chat template fails on one user message or alters its content.
        """
        if not chat or not self._tokenizer.chat_template:
            return Wrapper(self.opening, (), "", blank=True, opening=self.opening, starts=True)
        messages = [{"role": "user", "content": _SENTINEL}]
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a Jinja template may raise anything
            raise ConfigError(
                f"tokenizer {self.name}: its chat template fails on a user message ({error});"
                " set shards.chat to false"
            ) from error
        if text.count(_SENTINEL) != 1:
            raise ConfigError(
                f"tokenizer {self.name}: its chat template alters the user message;"
                " set shards.chat to false"
            )
        before, after = text.split(_SENTINEL)
        suffix = self.control(after)
        closed = after != after.rstrip() or bool(suffix and suffix[-1] in self.control_ids)
        opening, lead = self._cut_lead(before)
        trail, closing = self._cut_trail(after)
        return Wrapper(
            tuple(self.control(before)),
            tuple(suffix),
            after,
            blank=not closed,
            opening=opening,
            lead=lead,
            trail=trail,
            closing=closing,
            before=before,
            starts=not opening,
        )

    def _cut_lead(self, before: str) -> tuple[tuple[int, ...], str]:
        """Cut behind the last control token, unless the tokenizer sees another cut (a token may
        swallow the blanks beside it).
        """
        whole = self.control(before)
        cut = max(
            (before.rfind(token) + len(token) for token in self._added if token in before),
            default=0,
        )
        head = self.control(before[:cut])
        if head + self.continued([before[cut:]], start=not cut)[0] == whole:
            return tuple(head), before[cut:]
        return tuple(whole), ""

    def _cut_trail(self, after: str) -> tuple[str, tuple[int, ...]]:
        """Cut before the first control token, on the same condition."""
        cut = min(
            (after.index(token) for token in self._added if token in after), default=len(after)
        )
        tail = self.control(after[cut:])
        if self.control("a" + after) == self.control("a" + after[:cut]) + tail:
            return after[:cut], tuple(tail)
        return "", tuple(self.control(after))

    def answers(self, tail: str, yes: str, no: str, control: bool) -> AnswerIds:
        """Ids of the answers after a text, by the prefix rule.

        The ids of `tail` must begin those of `tail + yes` and `tail + no`; the first ids that
        differ are the answers. Otherwise the answer would merge with what precedes it and no
        position would predict it.

        Args:
            tail: Text right before the answer; need not reach back to the prompt's start.
            yes: The word for yes, with its leading blank if there is one.
            no: The word for no.
            control: Whether the tail is control text.

        Raises:
            ConfigError: An answer is not one token of its own.
        """
        encode: Callable[[str], list[int]] = self.control if control else self.content
        where = f"tokenizer {self.name}: after {tail[-20:]!r} the answers {yes!r} and {no!r}"
        base = encode(tail) if tail else []
        found = []
        for word in (yes, no):
            ids = encode(tail + word)
            if ids[: len(base)] != base or len(ids) != len(base) + 1:
                raise ConfigError(
                    f"{where} are not one token each (ids {ids[len(base) :]}); choose other"
                    " 'answers' or another 'cue' in the template"
                )
            found.append(ids[-1])
        if found[0] == found[1]:
            raise ConfigError(f"{where} are the same token; choose other 'answers'")
        return AnswerIds(*found)


def load_tokens(reference: str | Path) -> PromptTokens:
    """Read the tokenizer of a backbone from a local folder or the Hugging Face cache.

    Raises:
        ConfigError: There is no usable tokenizer there.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(reference), trust_remote_code=False)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"tokenizer {reference}: cannot be read ({text})") from None
    return PromptTokens(tokenizer, str(reference))


def _plain_copy(backend: Any) -> Any:
    """A private copy, so that settings made here never reach the caller's tokenizer."""
    twin = copy.deepcopy(backend)
    twin.no_truncation()
    twin.no_padding()
    return twin
