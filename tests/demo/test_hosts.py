"""Requests with a foreign name in the Host header are refused."""

from __future__ import annotations

import pytest

from lumos.errors import UserError

pytest.importorskip("starlette", reason="the demo needs the extra [demo]")
from lumos.demo.hosts import Hosts


def takes(*hosts: str, server: str = "192.168.1.5", allowed: tuple[str, ...] = ("Lumos.example", "::5")) -> bool:
    headers = [(b"host", host.encode("latin-1")) for host in hosts]
    return Hosts(allowed).takes({"headers": headers, "server": (server, 7860)})


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:7860", "LOCALHOST", "localhost.", "127.0.0.1", "127.0.0.1:80", "127.3.2.1", "[::1]",
             "[::1]:7860", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "lumos.example", "LUMOS.EXAMPLE.:443", "[::5]:80",
             "192.168.1.5:9000"],
)  # fmt: skip
def test_own_names_are_taken(host):
    assert takes(host)


@pytest.mark.parametrize(
    "host", ["", ":7860", "evil.example", "evil.example:7860", "localhost.evil.example", "evil.localhost", "127.0.0.1.evil.example",
             "evil.example#localhost", "localhost@evil.example", "evil.example@localhost", "http://localhost", "localhost/", "[::1",
             "::1", "[evil]", "[::2]", "localhost:", "localhost:x", "localhost:123456", "localhost..", ".localhost", "local host",
             "localhost,evil.example", "localhost evil.example", "l\u00f6calhost", "0.0.0.0", "192.168.1.6", "sub.lumos.example",
             "127.1", "2130706433", "localhost\t", "localhost\n"],
)  # fmt: skip
def test_other_names_are_refused(host):
    assert not takes(host)


def test_a_request_has_exactly_one_host():
    assert not takes()
    assert not takes("localhost", "localhost")
    assert not takes("localhost", "evil.example")


def test_the_address_that_was_reached_is_known():
    assert takes("10.0.0.7", server="::ffff:10.0.0.7")
    assert takes("[fe80::1]", server="fe80::1%eth0")
    assert not takes("10.0.0.7")


@pytest.mark.parametrize("name", ["http://a.example", "a.example/x", "", "*", "a b"])
def test_an_allowed_host_is_a_name(name):
    with pytest.raises(UserError, match=r"--allowed-host .* is not a host"):
        Hosts([name])
