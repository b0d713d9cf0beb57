"""Header rules of a gateway: what goes through."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
from tornado.httputil import HTTPHeaders

from tests.support.fields import headers_of, pairs
from tornado_proxy import headers as h

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
        assert h.nominated(headers_of(*(("Connection", line) for line in lines))) == names

    @pytest.mark.parametrize(
        "name",
        [*FAMILY, "Host", "Content-Length", "Content-Type", "Content-Encoding", "Transfer-Encoding", "Authorization",
         "Cookie", "Set-Cookie", "Via", "Cache-Control", "Expect"],
    )  # fmt: skip
    def test_leaves_out_what_is_for_all_recipients(self, name: str) -> None:
        assert h.nominated(headers_of(("Connection", f"close, {name.lower()}"))) == {"Close"}

    def test_is_shared_and_empty_without_the_field(self) -> None:
        assert h.nominated(headers_of()) is h.nominated(headers_of(("X", "y")))


def cleaned(headers: HTTPHeaders, *drop: frozenset[str]) -> HTTPHeaders:
    h.remove_hop_by_hop(headers, *drop)
    return headers


class TestRemoveHopByHop:
    @pytest.mark.parametrize("name", sorted(h.HOP_BY_HOP))
    def test_drops_hop_by_hop_fields_also_when_not_nominated(self, name: str) -> None:
        assert pairs(cleaned(headers_of((name.lower(), "x"), ("A", "b")))) == [("A", "b")]

    def test_hop_by_hop_names_are_normalised(self) -> None:
        assert all(next(iter(headers_of((name, "x")))) == name for name in h.HOP_BY_HOP)

    def test_drops_every_nominated_field(self) -> None:
        inbound = headers_of(
            ("Connection", "x-a"), ("X-A", "1"), ("Connection", "X-b, close"), ("X-B", "2"), ("X-C", "3")
        )
        assert pairs(cleaned(inbound)) == [("X-C", "3")]

    def test_keeps_what_must_not_be_nominated(self) -> None:
        inbound = headers_of(("Connection", "authorization, cookie"), ("Authorization", "a"), ("Cookie", "c"))
        assert pairs(cleaned(inbound)) == [("Authorization", "a"), ("Cookie", "c")]

    def test_drops_what_it_is_asked_to(self) -> None:
        assert pairs(cleaned(headers_of(("A", "1"), ("B", "2")), frozenset({"A"}))) == [("B", "2")]

    def test_keeps_repeated_fields_apart_and_in_order(self) -> None:
        fields = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2, x"), ("Set-Cookie", "c"), ("X", ""), ("Y", "\xe9")]
        assert pairs(cleaned(headers_of(*fields))) == fields


class TestRequestHeaders:
    @pytest.mark.parametrize("name", ["Host", "Content-Length", "Expect", "Proxy", "Connection", "TE", "Upgrade"])
    @pytest.mark.parametrize("trusted", [True, False])
    def test_drops_what_is_ours_to_say(self, name: str, trusted: bool) -> None:
        assert pairs(h.request_headers(headers_of((name, "x"), ("A", "b")), trusted=trusted)) == [("A", "b")]

    @pytest.mark.parametrize("name", FAMILY)
    def test_drops_the_forwarding_family_of_a_stranger(self, name: str) -> None:
        assert pairs(h.request_headers(headers_of((name, "1.2.3.4"), ("A", "b")), trusted=False)) == [("A", "b")]

    @pytest.mark.parametrize("name", FAMILY)
    def test_keeps_it_from_a_trusted_proxy(self, name: str) -> None:
        assert name in h.request_headers(headers_of((name, "1.2.3.4")), trusted=True)

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
        assert list(h.request_headers(headers_of((name, "x"), ("X_Custom", "y")), trusted=trusted)) == ["X_custom"]

    @pytest.mark.parametrize(
        "name", ["X-Forward", "X-Api-Key", "X_Custom", "X.Custom", "Scheme", "X-Real", "Client-Id", "User-Agent"]
    )
    def test_keeps_other_fields_of_a_stranger(self, name: str) -> None:
        assert name in h.request_headers(headers_of((name, "x")), trusted=False)

    def test_does_not_touch_the_inbound_fields(self) -> None:
        inbound = headers_of(("Host", "a"), ("X-Forwarded-For", "b"), ("A", "1"))
        before = pairs(inbound)
        h.request_headers(inbound, trusted=False)
        assert pairs(inbound) == before


class TestMemory:
    """Nothing that a client can make large is remembered."""

    def test_of_long_names_and_lists_nothing_stays(self) -> None:
        def requests() -> None:
            for n in range(20):
                names = ",".join(f"x{n}-{i}" for i in range(5_000))
                h.request_headers(headers_of(("Connection", names)), trusted=False)
                h.is_forwarding_field(f"X{n}" + "y" * 50_000)
                h.remove_hop_by_hop(headers_of(("Connection", names)))

        tracemalloc.start()
        try:
            requests()
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 1_000_000
        finally:
            tracemalloc.stop()


class TestRemoveRange:
    def test_nobody_is_asked_for_a_part(self) -> None:
        headers = headers_of(("Range", "bytes=0-1"), ("If-Range", '"a"'), ("A", "b"))
        h.remove_range(headers)
        h.remove_range(headers)
        assert pairs(headers) == [("A", "b")]


class TestBodyChanged:
    def test_sets_the_new_length(self) -> None:
        headers = headers_of(("Content-Length", "5"))
        h.body_changed(headers, 7)
        assert pairs(headers) == [("Content-Length", "7")]

    def test_sets_a_length_of_zero(self) -> None:
        headers = headers_of()
        h.body_changed(headers, 0)
        assert headers["Content-Length"] == "0"

    def test_removes_a_length_that_is_not_known(self) -> None:
        headers = headers_of(("Content-Length", "5"), ("A", "b"))
        h.body_changed(headers, None)
        assert pairs(headers) == [("A", "b")]

    @pytest.mark.parametrize("name", ["Content-MD5", "Digest", "Repr-Digest", "Content-Digest", "Accept-Ranges"])
    def test_removes_what_is_about_its_bytes(self, name: str) -> None:
        headers = headers_of((name, "x"))
        h.body_changed(headers, None)
        assert pairs(headers) == []

    @pytest.mark.parametrize(("etag", "expected"), [('"a"', 'W/"a"'), ('W/"a"', 'W/"a"'), ("bad", "bad")])
    def test_weakens_a_strong_etag(self, etag: str, expected: str) -> None:
        headers = headers_of(("Etag", etag))
        h.body_changed(headers, None)
        assert headers["Etag"] == expected
