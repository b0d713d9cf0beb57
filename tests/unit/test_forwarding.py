"""What is said of who asked, and of ourselves."""

from __future__ import annotations

import time

import pytest

from tests.support.fields import headers_of, pairs
from tornado_proxy import forwarding
from tornado_proxy.forwarding import Forwarding
from tornado_proxy.headers import request_headers

CLIENT = Forwarding(client="192.0.2.7", scheme="https", host="example.com:8443", port=8443, prefix="/foo")
NOBODY = Forwarding(client="unknown", scheme="http", host=None, port=None, prefix=None)


class TestAddXForwarded:
    def test_says_all_five(self) -> None:
        headers = headers_of()
        forwarding.add_x_forwarded(headers, CLIENT, trusted=False)
        assert pairs(headers) == [
            ("X-Forwarded-For", "192.0.2.7"),
            ("X-Forwarded-Proto", "https"),
            ("X-Forwarded-Host", "example.com:8443"),
            ("X-Forwarded-Port", "8443"),
            ("X-Forwarded-Prefix", "/foo"),
        ]

    @pytest.mark.parametrize(
        ("lines", "value"),
        [
            (["10.0.0.1"], "10.0.0.1, 192.0.2.7"),
            (["10.0.0.1, 10.0.0.2", "10.0.0.3"], "10.0.0.1, 10.0.0.2, 10.0.0.3, 192.0.2.7"),
            ([""], "192.0.2.7"),
        ],
    )
    def test_continues_a_trusted_chain_in_one_line(self, lines: list[str], value: str) -> None:
        headers = headers_of(*(("X-Forwarded-For", line) for line in lines))
        forwarding.add_x_forwarded(headers, CLIENT, trusted=True)
        assert headers.get_list("X-Forwarded-For") == [value]

    def test_keeps_what_a_trusted_proxy_said(self) -> None:
        said = [
            ("X-Forwarded-Proto", "wss"),
            ("X-Forwarded-Host", "pub"),
            ("X-Forwarded-Port", "1"),
            ("X-Forwarded-Prefix", "/p"),
        ]
        headers = headers_of(*said)
        forwarding.add_x_forwarded(headers, CLIENT, trusted=True)
        assert pairs(headers)[:4] == said

    def test_replaces_what_a_stranger_said(self) -> None:
        headers = headers_of(("X-Forwarded-For", "spoof"), ("X-Forwarded-For", "spoof2"), ("X-Forwarded-Host", "evil"))
        forwarding.add_x_forwarded(headers, CLIENT, trusted=False)
        assert headers.get_list("X-Forwarded-For") == ["192.0.2.7"]
        assert headers["X-Forwarded-Host"] == "example.com:8443"

    def test_removes_what_a_stranger_said_where_we_have_nothing_to_say(self) -> None:
        headers = headers_of(("X-Forwarded-Host", "evil"), ("X-Forwarded-Port", "1"), ("X-Forwarded-Prefix", "/evil"))
        forwarding.add_x_forwarded(headers, NOBODY, trusted=False)
        assert pairs(headers) == [("X-Forwarded-For", "unknown"), ("X-Forwarded-Proto", "http")]

    def test_writes_ipv6_bare(self) -> None:
        headers = headers_of()
        forwarding.add_x_forwarded(headers, Forwarding("2001:db8::1", "http", None, None, None), trusted=False)
        assert headers["X-Forwarded-For"] == "2001:db8::1"

    def test_survives_a_client_that_nominates_our_fields(self) -> None:
        inbound = headers_of(("Connection", "close, X-Forwarded-For, Via"), ("X-Forwarded-For", "spoof"))
        headers = request_headers(inbound, trusted=False)
        forwarding.add_x_forwarded(headers, CLIENT, trusted=False)
        assert headers["X-Forwarded-For"] == "192.0.2.7"


class TestAddForwarded:
    @pytest.mark.parametrize(
        ("client", "node"),
        [
            ("192.0.2.7", "192.0.2.7"),
            ("::1", '"[::1]"'),
            ("[::1]", '"[::1]"'),
            ("fe80::1%eth0", '"[fe80::1]"'),
            ("unknown", "unknown"),
            ("", '""'),
        ],
    )
    def test_quotes_nodes_that_are_no_tokens(self, client: str, node: str) -> None:
        headers = headers_of()
        forwarding.add_forwarded(headers, Forwarding(client, "http", None, None, None), trusted=False)
        assert headers["Forwarded"] == f"for={node};proto=http"

    @pytest.mark.parametrize(
        ("host", "value"),
        [
            ("example.com", "example.com"),
            ("a:80", '"a:80"'),
            ("[::1]", '"[::1]"'),
            ('a";for=x', '"a\\";for=x"'),
            ("\\", '"\\\\"'),
        ],
    )
    def test_quotes_hosts_that_are_no_tokens(self, host: str, value: str) -> None:
        headers = headers_of()
        forwarding.add_forwarded(headers, Forwarding("1.1.1.1", "http", host, None, None), trusted=False)
        assert headers["Forwarded"] == f"for=1.1.1.1;proto=http;host={value}"

    def test_appends_an_element_to_a_trusted_chain(self) -> None:
        headers = headers_of(("Forwarded", "for=a, for=b"), ("Forwarded", "for=c"))
        forwarding.add_forwarded(headers, NOBODY, trusted=True)
        assert headers.get_list("Forwarded") == ["for=a, for=b, for=c, for=unknown;proto=http"]

    def test_replaces_the_chain_of_a_stranger(self) -> None:
        headers = headers_of(("Forwarded", "for=spoof"), ("Forwarded", "for=spoof2"))
        forwarding.add_forwarded(headers, NOBODY, trusted=False)
        assert headers.get_list("Forwarded") == ["for=unknown;proto=http"]


class TestVia:
    @pytest.mark.parametrize(
        ("version", "member"), [("HTTP/1.1", "1.1 p"), ("HTTP/1.0", "1.0 p"), ("HTTP/2", "2 p"), ("1.1", "1.1 p")]
    )
    def test_names_the_version_received(self, version: str, member: str) -> None:
        headers = headers_of()
        forwarding.add_via(headers, version, "p")
        assert headers["Via"] == member

    def test_is_appended_in_one_line(self) -> None:
        headers = headers_of(("Via", "1.0 a"), ("Via", "1.1 b (c)"))
        forwarding.add_via(headers, "HTTP/1.1", "p")
        assert headers.get_list("Via") == ["1.0 a, 1.1 b (c), 1.1 p"]

    @pytest.mark.parametrize(
        ("lines", "count"),
        [
            ([], 0),
            (["1.1 other"], 0),
            (["1.1 tornado_proxy"], 1),
            (["HTTP/1.1 Tornado_Proxy (x)"], 1),
            (["1.1 tornado_proxy, 1.0 a", "1.1 tornado_proxy"], 2),
            (["1.1 tornado_proxy2"], 0),
            (["1.1 tornado_proxy:80"], 0),
            (["tornado_proxy"], 0),
            (["tornado_proxy x"], 0),
            (["1.1 a (1.1 tornado_proxy, 1.1 tornado_proxy)"], 0),
            (["1.1 a (x, 1.1 tornado_proxy (y), z), 1.1 tornado_proxy"], 1),
            (["1.1 a (\\), 1.1 tornado_proxy)"], 0),
            (["1.1 evil (, 1.1 tornado_proxy"], 1),
            (["1.1 evil ((, 1.1 tornado_proxy, 1.1 b (x)"], 1),
            (["1.1 evil (\\", "1.1 tornado_proxy"], 1),
            (["1.1 evil ), 1.1 tornado_proxy"], 1),
            (["1.1 tornado_proxy(x)"], 1),
            ([",,, ,"], 0),
        ],
    )
    def test_counts_how_often_it_came_through_us(self, lines: list[str], count: int) -> None:
        assert forwarding.via_count(headers_of(*(("Via", line) for line in lines)), "tornado_proxy") == count

    def test_counts_in_linear_time(self) -> None:
        start = time.perf_counter()
        forwarding.via_count(headers_of(("Via", "(" * 30_000 + "p" + ")" * 30_000)), "p")
        assert time.perf_counter() - start < 1

    def test_counts_what_it_added(self) -> None:
        headers = headers_of(("Via", "1.1 evil (("))
        for expected in (1, 2, 3):
            forwarding.add_via(headers, "HTTP/1.1", "tornado_proxy")
            assert forwarding.via_count(headers, "tornado_proxy") == expected
