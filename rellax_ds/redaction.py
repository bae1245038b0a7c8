"""Secrets are masked before anything is written: logs, sinks, manifests, the command line's error.

A key reaches an output by accident, in an override, a URL or another library's message, so what is
written is masked wherever it came from. Two nets: the shapes of the keys people have, and the
values of this process's own environment variables with such names. A pattern masks the secret and
leaves the words around it.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from rellax_ds import runtime

MASK = "[redacted]"
_SHORTEST = 8

_NAME = r"(?:token|secret|passw(?:or)?d|passphrase|credentials?|api_?key|[_-]key)"
_SECRET_NAME = re.compile(rf"(?i)\w*{_NAME}$")
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        # private keys in PEM
        r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        r"(?i)(?P<keep>\b[a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/@]+(?=@)",  # URL with a password
        r"(?i)(?P<keep>\bbearer\s+)[\w.~+/=-]{16,}",
        r"(?i)(?P<keep>\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|token)\s+)[\w.~+/=-]{8,}",
        r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+",  # JSON Web Token
        r"\bwandb_v\d+_\w{20,}",  # Weights & Biases, and the older key beside its name
        r"(?i)(?P<keep>\bwandb\b[^\n]{0,40}?\b(?:local-)?)[0-9a-f]{40}\b",
        r"\bhf_[A-Za-z0-9]{20,}",  # Hugging Face
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",  # AWS
        r"\bsk-[\w-]{20,}",  # OpenAI, Anthropic
        r"\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}",
        r"\bglpat-[\w-]{20,}",  # GitLab
        r"\bAIza[\w-]{35}",  # Google
        r"\bxox[a-z]-[\w-]{10,}",  # Slack
        r"(?P<keep>\bhooks\.slack\.com/services/)[\w/]+",
        # NAME_TOKEN=value, "api_key": "value", --password value
        rf"(?i)(?P<keep>(?<![a-z0-9])\w*{_NAME}[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&\[]{{4,}}",
        rf"(?i)(?P<keep>--[\w-]*{_NAME}\s+)[^\s-]\S{{3,}}",
    )
)


def redact(text: str) -> str:
    """The text with every secret found in it replaced by `MASK`."""
    if len(text) < _SHORTEST:
        return text
    for value in runtime.environment_values(is_secret_name):
        if len(value) >= _SHORTEST:
            text = text.replace(value, MASK)
    for pattern in _PATTERNS:
        text = pattern.sub(_masked, text)
    return text


def redacted(value: Any) -> Any:
    """A JSON-like value with the secrets in all its strings masked; what is under a secret's name
    is masked whatever it looks like.
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {
            name: MASK
            if isinstance(item, str) and item and is_secret_name(name)
            else redacted(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def is_secret_name(name: object) -> bool:
    """Whether a field or variable of this name holds a secret, as `HF_TOKEN` or `api_key` do."""
    return isinstance(name, str) and _SECRET_NAME.match(name) is not None


class SecretsFilter(logging.Filter):
    """Masks the message of every record that passes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let the record pass, masked."""
        record.msg, record.args = redact(record.getMessage()), ()
        return True


SECRETS = SecretsFilter()
"""The filter of our logger; one object, so that adding it twice changes nothing."""


def _masked(match: re.Match[str]) -> str:
    return match.groupdict().get("keep", "") + MASK
