"""Header rules of a gateway: what goes through, what is added."""

from __future__ import annotations

import gc
import time
import tracemalloc

import pytest
from tornado.httputil import HTTPHeaders

from tornado_proxy import headers as h
from tornado_proxy.headers import Forwarding


def make(*fields: tuple[str, str]) -> HTTPHeaders:
    made = HTTPHeaders()
    for name, value in fields:
        made.add(name, value)
    return made


def pairs(headers: HTTPHeaders) -> list[tuple[str, str]]:
    return list(headers.get_all())


CLIENT = Forwarding(client="192.0.2.7", scheme="https", host="example.com:8443", port=8443, prefix="/foo")
NOBODY = Forwarding(client="unknown", scheme="http", host=None, port=None, prefix=None)

FAMILY = [
    "Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port", "X-Forwarded-Prefix",
    "X-Forwarded-Server", "X-Forwarded-Ssl", "X-Forwarded-Scheme", "X-Forwarded-Anything-At-All", "X-Real-IP",
    "X-Scheme", "X-Client-IP", "True-Client-IP", "X-Original-URL", "X-Original-Host", "X-Rewrite-URL",
    "Front-End-Https", "X_Forwarded_For", "X-Forwarded_For", "x_real_ip", "X_ORIGINAL_URL", "True_Client-IP",
    "X.Forwarded.For", "X!Real~IP",
]  # fmt: skip


class TestNominated:
    @pytest.mark.parametrize(
        ("lines", "names"),
        [
            (["close"], {"Close"}),
            (["keep-alive, Upgrade"], {"Keep-Alive", "Upgrade"}),
            (["x-one", "X-TWO ,\tx-three"], {"X-One", "X-Two", "X-Three"}),
            ([",, ,x,"], {"X"}),
            ([""], set()),
        ],
    )
    def test_reads_all_connection_lines(self, lines: list[str], names: set[str]) -> None:
        assert h.nominated(make(*(("Connection", line) for line in lines))) == names

    @pytest.mark.parametrize(
        "name",
        [*FAMILY, "Host", "Content-Length", "Content-Type", "Content-Encoding", "Transfer-Encoding", "Authorization",
         "Cookie", "Set-Cookie", "Via", "Cache-Control", "Expect"],
    )  # fmt: skip
    def test_leaves_out_what_is_for_all_recipients(self, name: str) -> None:
        assert h.nominated(make(("Connection", f"close, {name.lower()}"))) == {"Close"}

    def test_is_shared_and_empty_without_the_field(self) -> None:
        assert h.nominated(make()) is h.nominated(make(("X", "y")))


def cleaned(headers: HTTPHeaders, *drop: frozenset[str]) -> HTTPHeaders:
    h.remove_hop_by_hop(headers, *drop)
    return headers


class TestRemoveHopByHop:
    @pytest.mark.parametrize("name", sorted(h.HOP_BY_HOP))
    def test_drops_hop_by_hop_fields_also_when_not_nominated(self, name: str) -> None:
        assert pairs(cleaned(make((name.lower(), "x"), ("A", "b")))) == [("A", "b")]

    def test_hop_by_hop_names_are_normalised(self) -> None:
        assert all(next(iter(make((name, "x")))) == name for name in h.HOP_BY_HOP)

    def test_drops_every_nominated_field(self) -> None:
        inbound = make(("Connection", "x-a"), ("X-A", "1"), ("Connection", "X-b, close"), ("X-B", "2"), ("X-C", "3"))
        assert pairs(cleaned(inbound)) == [("X-C", "3")]

    def test_keeps_what_must_not_be_nominated(self) -> None:
        inbound = make(("Connection", "authorization, cookie"), ("Authorization", "a"), ("Cookie", "c"))
        assert pairs(cleaned(inbound)) == [("Authorization", "a"), ("Cookie", "c")]

    def test_drops_what_it_is_asked_to(self) -> None:
        assert pairs(cleaned(make(("A", "1"), ("B", "2")), frozenset({"A"}))) == [("B", "2")]

    def test_keeps_repeated_fields_apart_and_in_order(self) -> None:
        fields = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2, x"), ("Set-Cookie", "c"), ("X", ""), ("Y", "\xe9")]
        assert pairs(cleaned(make(*fields))) == fields


class TestRequestHeaders:
    @pytest.mark.parametrize("name", ["Host", "Content-Length", "Expect", "Proxy", "Connection", "TE", "Upgrade"])
    @pytest.mark.parametrize("trusted", [True, False])
    def test_drops_what_is_ours_to_say(self, name: str, trusted: bool) -> None:
        assert pairs(h.request_headers(make((name, "x"), ("A", "b")), trusted=trusted)) == [("A", "b")]

    @pytest.mark.parametrize("name", FAMILY)
    def test_drops_the_forwarding_family_of_a_stranger(self, name: str) -> None:
        assert pairs(h.request_headers(make((name, "1.2.3.4"), ("A", "b")), trusted=False)) == [("A", "b")]

    @pytest.mark.parametrize("name", FAMILY)
    def test_keeps_it_from_a_trusted_proxy(self, name: str) -> None:
        assert name in h.request_headers(make((name, "1.2.3.4")), trusted=True)

    @pytest.mark.parametrize(
        "name",
        [
            "Transfer_Encoding",
            "CONTENT_LENGTH",
            "Proxy_Authorization",
            "Keep_alive",
            "Content.Length",
            "Proxy*Connection",
        ],
    )
    @pytest.mark.parametrize("trusted", [True, False])
    def test_drops_what_cgi_takes_for_a_field_that_stops_here(self, name: str, trusted: bool) -> None:
        assert list(h.request_headers(make((name, "x"), ("X_Custom", "y")), trusted=trusted)) == ["X_custom"]

    @pytest.mark.parametrize(
        "name", ["X-Forward", "X-Api-Key", "X_Custom", "X.Custom", "Scheme", "X-Real", "Client-Id", "User-Agent"]
    )
    def test_keeps_other_fields_of_a_stranger(self, name: str) -> None:
        assert name in h.request_headers(make((name, "x")), trusted=False)

    def test_does_not_touch_the_inbound_fields(self) -> None:
        inbound = make(("Host", "a"), ("X-Forwarded-For", "b"), ("A", "1"))
        before = pairs(inbound)
        h.request_headers(inbound, trusted=False)
        assert pairs(inbound) == before


class TestAddXForwarded:
    def test_says_all_five(self) -> None:
        headers = make()
        h.add_x_forwarded(headers, CLIENT, trusted=False)
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
        headers = make(*(("X-Forwarded-For", line) for line in lines))
        h.add_x_forwarded(headers, CLIENT, trusted=True)
        assert headers.get_list("X-Forwarded-For") == [value]

    def test_keeps_what_a_trusted_proxy_said(self) -> None:
        said = [
            ("X-Forwarded-Proto", "wss"),
            ("X-Forwarded-Host", "pub"),
            ("X-Forwarded-Port", "1"),
            ("X-Forwarded-Prefix", "/p"),
        ]
        headers = make(*said)
        h.add_x_forwarded(headers, CLIENT, trusted=True)
        assert pairs(headers)[:4] == said

    def test_replaces_what_a_stranger_said(self) -> None:
        headers = make(("X-Forwarded-For", "spoof"), ("X-Forwarded-For", "spoof2"), ("X-Forwarded-Host", "evil"))
        h.add_x_forwarded(headers, CLIENT, trusted=False)
        assert headers.get_list("X-Forwarded-For") == ["192.0.2.7"]
        assert headers["X-Forwarded-Host"] == "example.com:8443"

    def test_removes_what_a_stranger_said_where_we_have_nothing_to_say(self) -> None:
        headers = make(("X-Forwarded-Host", "evil"), ("X-Forwarded-Port", "1"), ("X-Forwarded-Prefix", "/evil"))
        h.add_x_forwarded(headers, NOBODY, trusted=False)
        assert pairs(headers) == [("X-Forwarded-For", "unknown"), ("X-Forwarded-Proto", "http")]

    def test_writes_ipv6_bare(self) -> None:
        headers = make()
        h.add_x_forwarded(headers, Forwarding("2001:db8::1", "http", None, None, None), trusted=False)
        assert headers["X-Forwarded-For"] == "2001:db8::1"

    def test_survives_a_client_that_nominates_our_fields(self) -> None:
        inbound = make(("Connection", "close, X-Forwarded-For, Via"), ("X-Forwarded-For", "spoof"))
        headers = h.request_headers(inbound, trusted=False)
        h.add_x_forwarded(headers, CLIENT, trusted=False)
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
        headers = make()
        h.add_forwarded(headers, Forwarding(client, "http", None, None, None), trusted=False)
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
        headers = make()
        h.add_forwarded(headers, Forwarding("1.1.1.1", "http", host, None, None), trusted=False)
        assert headers["Forwarded"] == f"for=1.1.1.1;proto=http;host={value}"

    def test_appends_an_element_to_a_trusted_chain(self) -> None:
        headers = make(("Forwarded", "for=a, for=b"), ("Forwarded", "for=c"))
        h.add_forwarded(headers, NOBODY, trusted=True)
        assert headers.get_list("Forwarded") == ["for=a, for=b, for=c, for=unknown;proto=http"]

    def test_replaces_the_chain_of_a_stranger(self) -> None:
        headers = make(("Forwarded", "for=spoof"), ("Forwarded", "for=spoof2"))
        h.add_forwarded(headers, NOBODY, trusted=False)
        assert headers.get_list("Forwarded") == ["for=unknown;proto=http"]


class TestVia:
    @pytest.mark.parametrize(
        ("version", "member"), [("HTTP/1.1", "1.1 p"), ("HTTP/1.0", "1.0 p"), ("HTTP/2", "2 p"), ("1.1", "1.1 p")]
    )
    def test_names_the_version_received(self, version: str, member: str) -> None:
        headers = make()
        h.add_via(headers, version, "p")
        assert headers["Via"] == member

    def test_is_appended_in_one_line(self) -> None:
        headers = make(("Via", "1.0 a"), ("Via", "1.1 b (c)"))
        h.add_via(headers, "HTTP/1.1", "p")
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
        assert h.via_count(make(*(("Via", line) for line in lines)), "tornado_proxy") == count

    def test_counts_in_linear_time(self) -> None:
        start = time.perf_counter()
        h.via_count(make(("Via", "(" * 30_000 + "p" + ")" * 30_000)), "p")
        assert time.perf_counter() - start < 1

    def test_counts_what_it_added(self) -> None:
        headers = make(("Via", "1.1 evil (("))
        for expected in (1, 2, 3):
            h.add_via(headers, "HTTP/1.1", "tornado_proxy")
            assert h.via_count(headers, "tornado_proxy") == expected


class TestMemory:
    """Nothing that a client can make large is remembered."""

    def test_of_long_names_and_lists_nothing_stays(self) -> None:
        def requests() -> None:
            for n in range(100):
                names = ",".join(f"x{n}-{i}" for i in range(5_000))
                h.request_headers(make(("Connection", names)), trusted=False)
                h.is_forwarding_field(f"X{n}" + "y" * 50_000)
                h.remove_hop_by_hop(make(("Connection", names)))

        tracemalloc.start()
        try:
            requests()
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 1_000_000
        finally:
            tracemalloc.stop()


class TestRemoveRange:
    def test_nobody_is_asked_for_a_part(self) -> None:
        headers = make(("Range", "bytes=0-1"), ("If-Range", '"a"'), ("A", "b"))
        h.remove_range(headers)
        h.remove_range(headers)
        assert pairs(headers) == [("A", "b")]


class TestBodyChanged:
    def test_sets_the_new_length(self) -> None:
        headers = make(("Content-Length", "5"))
        h.body_changed(headers, 7)
        assert pairs(headers) == [("Content-Length", "7")]

    def test_sets_a_length_of_zero(self) -> None:
        headers = make()
        h.body_changed(headers, 0)
        assert headers["Content-Length"] == "0"

    def test_removes_a_length_that_is_not_known(self) -> None:
        headers = make(("Content-Length", "5"), ("A", "b"))
        h.body_changed(headers, None)
        assert pairs(headers) == [("A", "b")]

    @pytest.mark.parametrize("name", ["Content-MD5", "Digest", "Repr-Digest", "Content-Digest", "Accept-Ranges"])
    def test_removes_what_is_about_its_bytes(self, name: str) -> None:
        headers = make((name, "x"))
        h.body_changed(headers, None)
        assert pairs(headers) == []

    @pytest.mark.parametrize(("etag", "expected"), [('"a"', 'W/"a"'), ('W/"a"', 'W/"a"'), ("bad", "bad")])
    def test_weakens_a_strong_etag(self, etag: str, expected: str) -> None:
        headers = make(("Etag", etag))
        h.body_changed(headers, None)
        assert headers["Etag"] == expected
