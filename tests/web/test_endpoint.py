"""--http-endpoint means what it says."""

from __future__ import annotations

import contextlib
import socket

import pytest
from gpuslice.errors import ConfigError
from gpuslice.web.endpoint import Endpoint

IPV4, IPV6 = "127.0.0.1", "::1"


def reaches(port: int, host: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 2):
        return True
    return False


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("0", {IPV4, IPV6}),
        (":0", {IPV4, IPV6}),
        ("127.0.0.1:0", {IPV4}),
        ("0.0.0.0:0", {IPV4}),
        ("localhost:0", {IPV4}),
        ("[::1]:0", {IPV6}),
        ("[::]:0", {IPV6}),
    ],
)
def test_an_endpoint_listens_at_what_it_names_and_at_both_families_where_it_names_none(
    text: str, reached: set[str]
) -> None:
    with Endpoint.parse(text).listen() as listener:
        port = listener.getsockname()[1]

        assert {host for host in (IPV4, IPV6) if reaches(port, host)} == reached


@pytest.mark.parametrize("text", ["9510", ":9510", "node.example:9510", "10.0.0.1:9510", "[fe80::1%eth0]:9510"])
def test_the_port_is_the_one_that_is_written(text: str) -> None:
    assert Endpoint.parse(text).port == 9510


@pytest.mark.parametrize(
    "text",
    ["", "nine", "127.0.0.1", "127.0.0.1:", "::1:9510", "[::1]", "[::1]9510", "host:port", "a:b:1", "65536", "1:99999",
     "http://127.0.0.1:9510", "-1", "9510 ", "٩٥١٠", "[host]:9510", "127.0.0.1:9510/metrics"],
)  # fmt: skip
def test_what_is_no_endpoint_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"name a port up to 65535, host:port or \[IPv6 address\]:port"):
        Endpoint.parse(text)


@pytest.mark.parametrize("host", ["192.0.2.1:9510", "no-such-host.invalid:9510"])
def test_an_address_that_is_not_ours_is_one_sentence(host: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host} .*; name a free host:port"):
        Endpoint.parse(host).listen()


def test_a_port_in_use_is_one_sentence() -> None:
    with (
        Endpoint.parse("127.0.0.1:0").listen() as listener,
        pytest.raises(ConfigError, match=r"in use\); name a free host:port"),
    ):
        Endpoint("127.0.0.1", listener.getsockname()[1]).listen()
