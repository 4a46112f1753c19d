"""Whether the Hugging Face Hub can be reached."""

import os
import socket

import pytest

from gptlab.data.hub import use_cache_if_unreachable


@pytest.mark.parametrize(
    ("endpoint", "proxy", "reason"),
    [
        ("https://localhost", None, None),
        ("https://nothing.invalid", None, "the name nothing.invalid cannot be resolved"),
        ("https://nothing.invalid", "http://localhost:9", None),
    ],
)
def test_without_the_name_of_the_hub_only_its_cache_is_used(monkeypatch, endpoint, proxy, reason):
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    if proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
    if reason:  # RFC 6761 reserves the name, but some resolvers answer for every name

        def fail(*_):
            raise socket.gaierror

        monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert use_cache_if_unreachable() == reason
    assert os.environ.get("HF_HUB_OFFLINE") == ("1" if reason else None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
