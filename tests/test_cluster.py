"""Which Ray a command runs on."""

import socket

import pytest

from slm_ray import cluster
from slm_ray.errors import UserError


def test_a_cluster_that_is_gone_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"no Ray cluster answers at RAY_ADDRESS={address}"):
        cluster.connect()


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "nonsense"])
def test_an_address_that_is_none_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match="no Ray cluster answers"):
        cluster.connect()
