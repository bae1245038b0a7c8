"""Prompt templates: wording as data, read from YAML and checked before a prompt is written.

A template is a handful of texts with `{fields}`. It is cut into pieces once: runs of text, which
the tokenizer sees whole, and the fields that stand on their own (`{soft}`, `{answer}`, `{index}`,
`{rating}` and the like), which are segment boundaries. Because the boundaries are the template's
and not the rendered text's, no title can move them.

Keys of a template file:

    opening   stands first when no chat wrapper does (optional)
    profile   fields of the user table; left out when one of its fields is empty (optional)
    lead_in   stands before the history, if there is any (optional)
    history   one history item; holds `{soft}` once, may hold `{index}`, `{rating}`, `{answer}`
    between   stands between two history items (optional)
    lead_out  stands after the history, if there is any (optional)
    target    the question; holds `{soft}` once
    cue       added to the question when no chat wrapper asks for the answer (optional)
    answers   the words for yes and no, with the blank that parts them from what precedes

`profile` may name columns of the user table, `history` and `target` columns of the item table and
`{name}` (the title in reading order, without year), all of them `{like_rule}` and `{max_rating}`.
For lists in Python's notation there are `{quoted}`, the title as `repr` writes it between its
quotes, and `{quote}`, that quote; `{index0}` counts from 0, and `{stars}` is `star` for a rating of
at most 1, else `stars`.
"""

from __future__ import annotations

import difflib
import string
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Literal, cast

import yaml

from rellax_ds.config import digest
from rellax_ds.errors import ConfigError

Kind = Literal["text", "soft", "answer", "index", "index0", "rating", "stars"]

_MAX_BYTES = 1 << 16
_TEXTS = ("opening", "profile", "lead_in", "history", "between", "lead_out", "target", "cue")
_KEYS = (*_TEXTS, "answers")
_VALUES = ("index", "index0", "rating", "stars")
_CUTS = ("soft", "answer", *_VALUES)
_ALLOWED_CUTS: dict[str, tuple[str, ...]] = dict.fromkeys(_TEXTS, ()) | {
    "history": _CUTS,
    "target": ("soft",),
}


@dataclass(frozen=True)
class Piece:
    """One segment of a template, tokenised on its own.

    Attributes:
        kind: `text`, or the name of the field that stands on its own.
        parts: Of a text: (literal, field or None) in order. Of an index, a rating and the like: the
            blanks that precede the value, as one literal.
    """

    kind: Kind
    parts: tuple[tuple[str, str | None], ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields a text piece needs."""
        return tuple(name for _, name in self.parts if name is not None)

    @property
    def tail(self) -> str:
        """The literal a text piece ends with, after its last field."""
        return self.parts[-1][0] if self.parts and self.parts[-1][1] is None else ""


@dataclass(frozen=True)
class Template:
    """A checked template; see the module's text for what the keys mean.

    Attributes:
        name: Name of the shipped template, or the file's stem.
        history: Text of one history item.
        target: Text of the question.
        yes: The word for yes, with its leading blank.
        no: The word for no.
        profile: Text about the user.
        lead_in: Text before the history.
        cue: Text after the question when there is no chat wrapper.
        opening: Text before everything when there is no chat wrapper.
        between: Text between two history items.
        lead_out: Text after the history.
    """

    name: str
    history: str
    target: str
    yes: str
    no: str
    profile: str = ""
    lead_in: str = ""
    cue: str = ""
    opening: str = ""
    between: str = ""
    lead_out: str = ""
    _pieces: dict[str, tuple[Piece, ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        """Cut every text once, which also checks it."""
        for key in _TEXTS:
            self._pieces[key] = _cut(getattr(self, key), key, self.name)
        for key in ("history", "target"):
            count = sum(piece.kind == "soft" for piece in self._pieces[key])
            if count != 1:
                raise ConfigError(
                    f"template {self.name}: '{key}' holds {{soft}} {count} times, expected once"
                )
        if sum(piece.kind == "answer" for piece in self._pieces["history"]) > 1:
            raise ConfigError(f"template {self.name}: 'history' holds {{answer}} more than once")
        for key in ("yes", "no"):
            word = getattr(self, key)
            if not word.strip() or word != word.rstrip():
                raise ConfigError(
                    f"template {self.name}: answers.{key} is {word!r}, expected a word"
                    " without trailing blanks"
                )
        if self.yes.strip() == self.no.strip():
            raise ConfigError(f"template {self.name}: the answers are both {self.yes!r}")

    def pieces(self, key: str) -> tuple[Piece, ...]:
        """Segments of one of the texts, in order."""
        return self._pieces[key]

    def question(self, wrapped: bool) -> tuple[Piece, ...]:
        """Segments of the question, followed by the cue unless a chat wrapper follows."""
        return self._pieces["target"] if wrapped else _cut(self.target + self.cue, "target", "")

    def document(self) -> dict[str, str]:
        """The texts as a plain mapping, from which `Template(**document)` is the same template."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}

    @property
    def digest(self) -> str:
        """Digest of the texts: equal digests mean equal wording, whatever the file's name."""
        return digest({key: text for key, text in self.document().items() if key != "name"})


def shipped_templates() -> dict[str, Path]:
    """Name to file of every template that ships with the package."""
    folder = Path(str(resources.files("rellax_ds"))) / "prompts"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_template(name: str | Path) -> Template:
    """Read a template by shipped name or by path to a YAML file.

    Raises:
        ConfigError: There is no such template, or a key or field in it is wrong.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        shipped = shipped_templates()
        if str(name) not in shipped:
            raise ConfigError(
                f"shards.template is '{name}': choose one of {', '.join(shipped)} or give the path"
                " of a .yaml file"
            )
        path = shipped[str(name)]
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"template {path}: not a file of at most {_MAX_BYTES} bytes")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"template {path}: not valid YAML: {text}") from None
    return _parse(document, path)


def _parse(document: object, path: Path) -> Template:
    if not isinstance(document, dict):
        raise ConfigError(f"template {path}: expected a mapping with keys {', '.join(_KEYS)}")
    for key in document:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"template {path}: unknown key '{key}'; the nearest valid key is '{near}'"
            )
    texts = {key: value for key, value in document.items() if key != "answers"}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise ConfigError(f"template {path}: '{key}' is {value!r}, expected a text")
    answers = document.get("answers")
    if (
        not isinstance(answers, dict)
        or set(answers) != {"yes", "no"}
        or not all(isinstance(word, str) for word in answers.values())
    ):
        raise ConfigError(
            f"template {path}: 'answers' is {answers!r}, expected two quoted keys,"
            ' for example {"yes": " Yes", "no": " No"}'
        )
    for key in ("history", "target"):
        if not texts.get(key):
            raise ConfigError(f"template {path}: key '{key}' is missing")
    return Template(name=path.stem, **texts, **answers)


def _cut(text: str, key: str, name: str) -> tuple[Piece, ...]:
    """Cut a text at the fields that stand on their own; blanks before a value go with the value."""
    pieces: list[Piece] = []
    parts: list[tuple[str, str | None]] = []
    try:
        found = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"template {name}: '{key}': {error}; write {{{{ for a brace") from None
    for literal, field_name, spec, conversion in found:
        if spec or conversion or (field_name is not None and not field_name.isidentifier()):
            raise ConfigError(
                f"template {name}: '{key}' holds {{{field_name}}}; a field is a plain name"
            )
        if field_name in _CUTS:
            if field_name not in _ALLOWED_CUTS[key]:
                raise ConfigError(f"template {name}: '{key}' may not hold {{{field_name}}}")
            kept = literal.rstrip(" ") if field_name in _VALUES else literal
            first = not (pieces or parts or literal)
            if field_name == "answer" and (first or literal.endswith(" ")):
                raise ConfigError(
                    f"template {name}: '{key}': text without a trailing blank must precede"
                    " {answer}; the words under 'answers' bring their own"
                )
            _close(pieces, parts, kept)
            blanks = literal[len(kept) :]
            pieces.append(Piece(cast("Kind", field_name), ((blanks, None),) if blanks else ()))
        else:
            if literal:
                parts.append((literal, None))
            if field_name is not None:
                parts.append(("", field_name))
    _close(pieces, parts, "")
    return tuple(pieces)


def _close(pieces: list[Piece], parts: list[tuple[str, str | None]], literal: str) -> None:
    if literal:
        parts.append((literal, None))
    if parts:
        pieces.append(Piece("text", tuple(parts)))
        parts.clear()
