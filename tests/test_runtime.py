"""Where the process meets the network."""

from __future__ import annotations

import os

import pytest

from rellax_ds import runtime


@pytest.mark.parametrize(
    ("address", "chosen", "expected"),
    [
        ("127.0.0.1", None, "lo"),
        ("127.0.0.1", "eth7", "eth7"),
        ("no.such.host.invalid", None, None),
        (None, None, None),
    ],
)
def test_gloo_takes_the_interface_to_the_first_host_unless_one_is_chosen(
    monkeypatch: pytest.MonkeyPatch, address: str | None, chosen: str | None, expected: str | None
) -> None:
    for name, value in {"MASTER_ADDR": address, "GLOO_SOCKET_IFNAME": chosen}.items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    runtime.prepare_network()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected
