"""Access to the Hugging Face Hub. Imports neither torch nor the Hub's client."""

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

ENDPOINT = "https://huggingface.co"  # unless HF_ENDPOINT is set


def use_cache_if_unreachable() -> str | None:
    """Sets HF_HUB_OFFLINE if the name of the Hub cannot be resolved, so that its client does not retry for 30 seconds.

    Must be called before the client is imported. With a proxy, which resolves names itself, nothing is set.

    Returns:
        Why the Hub cannot be reached: "the name huggingface.co cannot be resolved"; None if that is not known.
    """
    address = urlsplit(os.environ.get("HF_ENDPOINT") or ENDPOINT)
    if getproxies().keys() & {address.scheme, "all"}:
        return None
    try:
        socket.getaddrinfo(address.hostname, address.port or address.scheme)
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        return f"the name {address.hostname} cannot be resolved"
    return None
