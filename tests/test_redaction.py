"""Secrets that reach an output by accident are masked, and ordinary words are not."""

from __future__ import annotations

import logging

import pytest

from rellax_ds import runtime
from rellax_ds.redaction import MASK, redact, redacted

PIECES = "Xy7Qk2Lw9Zt4Rb6Vn8Mc1Ps3Hd5Jf0GaTe"
SECRETS = {
    "pem": f"-----BEGIN RSA PRIVATE KEY-----\n{PIECES}\n{PIECES}\n-----END RSA PRIVATE KEY-----",
    "torn pem": f"-----BEGIN PRIVATE KEY-----\n{PIECES}",
    "url": f"s3 at https://reader:{PIECES}@host/bucket",
    "bearer": f"Authorization: Bearer {PIECES}",
    "basic": f"'authorization': 'Basic {PIECES}=='",
    "jwt": f"eyJ{PIECES}.eyJ{PIECES}.{PIECES}",
    "wandb": f"wandb_v1_{PIECES}",
    "old wandb": "WANDB says: cannot use 0123456789abcdef0123456789abcdef01234567",
    "hugging face": f"hf_{PIECES}",
    "aws": "AKIAXY7QK2LW9ZT4RB6V",
    "openai": f"sk-proj-{PIECES}",
    "github": f"ghp_{PIECES}",
    "github fine": f"github_pat_{PIECES}",
    "gitlab": f"glpat-{PIECES}",
    "google": f"AIza{PIECES}X",
    "slack": f"xoxb-{PIECES}",
    "slack hook": f"https://hooks.slack.com/services/T0/B0/{PIECES}",
    "variable": f"export HF_TOKEN={PIECES}",
    "assignment": f"AWS_SECRET_ACCESS_KEY={PIECES} and more",
    "json": f'{{"api_key": "{PIECES}", "rank": 8}}',
    "flag": f"--wandb-api-key {PIECES}",
    "password": f"PASSWORD='{PIECES}'",
}
HARMLESS = (
    "train: step 12 of 30, valid AUC 0.7955, log loss 0.5417 (untrained)",
    "3d7bf8b0123456789abcdef0123456789abcdef0 on 2 cores, max_tokens: 4096, slot_token: 110",
    "monkey: a film about tokens; https://example.org/a:b@c and task-based-learning-of-everything",
    "sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 of 6_train/adapter",
)


@pytest.mark.parametrize("kind", SECRETS)
def test_secret_is_masked_and_its_surroundings_stay(kind: str) -> None:
    masked = redact(f"before, {SECRETS[kind]}")
    assert masked.startswith("before, ")
    assert MASK in masked
    for piece in (PIECES[4:12], "LW9ZT4RB", "89abcdef"):
        assert piece not in masked


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


def test_value_of_a_secret_variable_is_masked_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COMPANY_ACCESS_TOKEN", "looks-like-nothing")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    assert redact("a looks-like-nothing is true") == f"a {MASK} is true"


def test_nested_value_under_a_secret_name_is_masked() -> None:
    document = {"train": [{"password": "abc", "rate": 0.1, "note": "hf_" + "a" * 30}], "key": "k"}
    assert redacted(document) == {
        "train": [{"password": MASK, "rate": 0.1, "note": MASK}],
        "key": "k",
    }


def test_log_line_is_masked_after_its_arguments_are_filled_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime.prepare()
    with caplog.at_level(logging.INFO, logger="rellax_ds"):
        runtime.logger.info("cannot reach %s", SECRETS["url"])
    assert f"reader:{MASK}@host" in caplog.text
    assert PIECES not in caplog.text
