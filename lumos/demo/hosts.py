"""The check of the Host header, which protects the demo from DNS rebinding."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.types import Scope

from lumos.errors import UserError, shown

HOST = re.compile(r"(?:\[(?P<literal>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?)(?::[0-9]{1,5})?", re.ASCII)


class Hosts:
    """The names that a Host header may hold.

    Allowed are the names and addresses of the loopback interface, the address that the request came
    to, and the names that the user allows.

    Another site can let its own domain name resolve to the address of this machine (DNS rebinding).
    To the browser, a page of that site then has the same origin as the demo. The Host header still
    holds the name of the other site, which is not allowed here. starlette's TrustedHostMiddleware
    does not suffice: it looks only at the first of several Host headers, and it does not know the
    address that a request came to.
    """

    def __init__(self, allowed: Iterable[str] = (), listening: str = "localhost"):
        """allowed: the names and addresses of --allowed-host; listening: the name or address of --host.

        UserError for an allowed host that is neither a name nor an address.
        """
        self.allowed = {parsed_name(listening.lower())}
        for text in allowed:
            host = parsed(f"[{text}]" if text.count(":") > 1 and "[" not in text else text)
            if host is None:
                raise UserError(f"--allowed-host {shown(text)} is not a host; give a name or an address, without http:// and path")
            self.allowed.add(host)

    @property
    def is_local(self) -> bool:
        """Whether the server listens to this machine only, and under no other name."""
        return all(host == "localhost" or is_loopback(host) for host in self.allowed)

    def takes(self, scope: Scope) -> bool:
        """Return whether the request has exactly one Host header and that header holds an allowed name."""
        headers = [value for name, value in scope["headers"] if name == b"host"]
        host = parsed(headers[0].decode("latin-1")) if len(headers) == 1 else None
        if host is None:
            return False
        here = scope.get("server") or ("", None)
        return host == "localhost" or host in self.allowed or host == parsed_name(here[0]) or is_loopback(host)


def parsed(text: str) -> str | IPv4Address | IPv6Address | None:
    """Return the name in lower case, or the address, of a Host header, without the port; None if it is malformed."""
    match = HOST.fullmatch(text.lower())
    if match is None or (match["literal"] and not isinstance(parsed_name(match["literal"]), IPv4Address | IPv6Address)):
        return None
    return parsed_name(match["literal"] or match["name"])


def parsed_name(text: str) -> str | IPv4Address | IPv6Address:
    try:
        address = ip_address(text.partition("%")[0])  # the name of a network interface may follow after %
    except ValueError:
        return text
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(host: str | IPv4Address | IPv6Address) -> bool:
    return not isinstance(host, str) and host.is_loopback
