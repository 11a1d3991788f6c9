"""Which requests of browsers a program on loopback answers, by their `Host` and `Origin` headers.

A name that a stranger owns may point to 127.0.0.1 (DNS rebinding), and any web page may post a form
to loopback. Both would use the program in the name of this machine's user.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping

from seed_multimodal.errors import short_name

# A scheme, a host and perhaps its port; browsers send nothing else.
ORIGIN = re.compile(r"\A[a-z][a-z0-9+.-]*+://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+?)\.?(:[0-9]*)?")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's alone, as browsers resolve it."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name
        return False


def problem(bound_host: str, headers: Mapping[str, str], origins: Collection[str] = ()) -> str:
    """Why a request is refused, as a sentence; "" for one that is answered.

    bound_host: on which the program listens. Where other machines reach it nothing is refused, as
        its names are not known.
    headers: of the request; programs that are no browsers have no `Origin`.
    origins: of further web pages that are allowed, as browsers send them; "*": any.
    """
    if not is_loopback(bound_host) or "*" in origins:
        return ""
    host = headers.get("Host", "")
    origin = headers.get("Origin", "")
    allowed = [item.lower() for item in origins]
    if origin and origin.lower() not in allowed and not is_loopback(_host_of(origin)):
        return f"The web page {short_name(origin)!r} is not allowed; allow it by --allow-origin."
    allowed_hosts = [_host_of(item) for item in allowed]
    name = _host_of(f"http://{host}")
    if host and not is_loopback(name) and (not name or name not in allowed_hosts):
        return (
            f"{short_name(host)!r} is not this machine's own address, on which this program "
            f"listens: use 127.0.0.1, or allow the address by --allow-origin."
        )
    return ""


def _host_of(origin: str) -> str:
    """The host of an origin, in lower case; "" for another text."""
    match = ORIGIN.fullmatch(origin.lower())
    return match[1] if match else ""
