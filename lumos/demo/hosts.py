"""Which names a request may call this server by: what keeps pages of other sites from reaching it under a name of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.types import Scope

from lumos.errors import UserError, shown

HOST = re.compile(r"(?:\[(?P<literal>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?)(?::[0-9]{1,5})?", re.ASCII)


class Hosts:
    """The names that a Host header may hold: those of the loopback, the address that the request came to, and the allowed ones.

    A page of another site can give its own name the address of this machine (DNS rebinding) and is then, to the browser, of the
    same origin as the demo. Its name still stands in the Host header, and it is none of these. starlette's TrustedHostMiddleware
    looks at the first of several Host headers only and does not know the address that a request came to.
    """

    def __init__(self, allowed: Iterable[str] = (), listening: str = "localhost"):
        """allowed: names and addresses that the user gave; listening: that of --host."""
        self.allowed = {parsed_name(listening.lower())}
        for text in allowed:
            host = parsed(f"[{text}]" if text.count(":") > 1 and "[" not in text else text)
            if host is None:
                raise UserError(f"--allowed-host {shown(text)} is not a host; give a name or an address, without http:// and path")
            self.allowed.add(host)

    def takes(self, scope: Scope) -> bool:
        """Whether the request has one Host header, well formed, with a name that is known here."""
        headers = [value for name, value in scope["headers"] if name == b"host"]
        host = parsed(headers[0].decode("latin-1")) if len(headers) == 1 else None
        if host is None:
            return False
        here = scope.get("server") or ("", None)
        return host == "localhost" or host in self.allowed or host == parsed_name(here[0]) or is_loopback(host)


def parsed(text: str) -> str | IPv4Address | IPv6Address | None:
    """The name in lower case, or the address, of a Host header; None if it is malformed. The port is of no interest."""
    match = HOST.fullmatch(text.lower())
    if match is None or (match["literal"] and not isinstance(parsed_name(match["literal"]), IPv4Address | IPv6Address)):
        return None
    return parsed_name(match["literal"] or match["name"])


def parsed_name(text: str) -> str | IPv4Address | IPv6Address:
    try:
        address = ip_address(text.partition("%")[0])  # what follows % is the interface
    except ValueError:
        return text
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(host: str | IPv4Address | IPv6Address) -> bool:
    return not isinstance(host, str) and host.is_loopback
