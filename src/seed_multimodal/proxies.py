"""Which addresses are reached without the proxy that the environment sets."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

LOCAL_DOMAINS = (".localhost", ".local", ".internal")  # host.docker.internal


def direct(url: str) -> bool:
    """Whether a URL's host is this machine or in its network: a loopback or private address, or a
    name without a dot or below a reserved domain. Proxies of the environment are for others."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
        is_name = "." not in host and ":" not in host
        if is_name or host.endswith(LOCAL_DOMAINS):
            return True
        return not ipaddress.ip_address(host).is_global
    except ValueError:  # a name with dots, or no URL
        return False


@contextlib.contextmanager
def without_proxy() -> Iterator[None]:
    """Hide the environment's proxies from libraries that are called in the block."""
    # The name in capitals counts only without this one.
    before = os.environ.get("no_proxy")
    os.environ["no_proxy"] = "*"
    try:
        yield
    finally:
        del os.environ["no_proxy"]
        if before is not None:
            os.environ["no_proxy"] = before
