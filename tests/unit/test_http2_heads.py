"""server.http2.heads: fields of HTTP/2 -> a verdict, and back."""

from __future__ import annotations

import pytest
from hpack import NeverIndexedHeaderTuple
from tornado.httputil import HTTPHeaders

from tornado_proxy.errors import BadRequest
from tornado_proxy.framing import CHUNKED, NO_BODY, Framing
from tornado_proxy.server.http2.heads import (
    Malformed,
    http2_trailers,
    request_head,
    request_trailers,
    response_fields,
)

PSEUDO = {":method": "GET", ":scheme": "https", ":path": "/", ":authority": "a"}


def fields(*more, **changed):
    """Return pseudo-header fields, those in `changed` otherwise or (None) not at all, and `more` fields."""
    pseudo = PSEUDO | {f":{name}": value for name, value in changed.items()}
    pairs = [(name, value) for name, value in pseudo.items() if value is not None] + list(more)
    return [
        (
            name.encode("latin-1") if isinstance(name, str) else name,
            value.encode("latin-1") if isinstance(value, str) else value,
        )
        for name, value in pairs
    ]


def head(*more, ended=True, max_size=65536, **changed):
    return request_head(fields(*more, **changed), ended=ended, max_size=max_size)


class TestRequests:
    def test_a_plain_one(self):
        found = head(("accept", "*/*"), ("x-a", "1"), ("x-a", "2"), ("x-empty", ""), path="/a%2Fb?x=1&y")
        assert (found.method, found.target, found.version) == ("GET", "/a%2Fb?x=1&y", "HTTP/2.0")
        assert list(found.headers.get_all()) == [
            ("Accept", "*/*"),
            ("X-A", "1"),
            ("X-A", "2"),
            ("X-Empty", ""),
            ("Host", "a"),
        ]
        assert found.headers["x-a"] == "1,2"
        assert (found.framing, found.keep_alive, found.expects_continue) == (NO_BODY, True, False)

    def test_headers_are_as_tornado_would_have_made_them(self):
        found = head(("x-a", "1"), ("x-b", "\xe9"), ("x-a", "2")).headers
        made = HTTPHeaders()
        for name, value in (("x-a", "1"), ("x-b", "\xe9"), ("x-a", "2"), ("host", "a")):
            made.add(name, value)
        # The cache fills as it is asked.
        assert vars(found).keys() == vars(made).keys()
        assert found._as_list == made._as_list
        assert dict(found) == dict(made)

    @pytest.mark.parametrize(
        ("changed", "more"),
        [
            ({"method": "PATCH"}, []),
            ({"method": "M-SEARCH", "path": "/x"}, []),
            ({"method": "OPTIONS", "path": "*"}, []),
            ({"scheme": "http"}, []),
            ({"scheme": "coap+tcp"}, []),
            ({"path": "//double//?"}, []),
            ({"path": "/\xff"}, []),
            ({"authority": "a:65535"}, []),
            ({"authority": "[::1]:8443"}, []),
            ({"authority": None}, [("host", "b")]),
            ({"authority": "EXAMPLE.com"}, [("host", "example.COM")]),
            ({}, [("te", "trailers")]),
            ({}, [("te", "Trailers")]),
            ({}, [("x", "a\tb")]),
            ({}, [("!#$%&'*+-.^_`|~09", "x")]),
        ],
    )
    def test_what_is_one(self, changed, more):
        assert head(*more, **changed).keep_alive

    @pytest.mark.parametrize(
        ("changed", "more"),
        [
            # Section 8.3: complete, first, once, and no others.
            ({"method": None}, []),
            ({"scheme": None}, []),
            ({"path": None}, []),
            ({"authority": None}, []),
            ({}, [(":path", "/")]),
            ({}, [(":method", "GET")]),
            ({}, [("x", "y"), (":protocol", "websocket")]),
            ({"status": "200"}, []),
            ({"protocol": "websocket"}, []),
            ({"protocol": "websocket", "method": "CONNECT"}, []),
            ({"x": "y"}, []),
            ({}, [("x", "y"), (":authority", "a")]),
            # Section 8.3.1.
            ({"method": ""}, []),
            ({"method": "GE T"}, []),
            ({"method": "GET / HTTP/1.1\r\nX: y"}, []),
            ({"path": ""}, []),
            ({"path": "*"}, []),
            ({"path": "x"}, []),
            ({"path": "http://a/"}, []),
            ({"path": "/ HTTP/1.1"}, []),
            ({"path": "/\r\nX: y"}, []),
            ({"path": "/\0"}, []),
            ({"scheme": ""}, []),
            ({"scheme": "http://evil/"}, []),
            ({"authority": ""}, []),
            ({"authority": "user@a"}, []),
            ({"authority": "a b"}, []),
            ({"authority": "a/b"}, []),
            ({"authority": "a, b"}, []),
            ({"authority": "a:65536"}, []),
            ({"authority": "a:x"}, []),
            ({"authority": "a"}, [("host", "b")]),
            ({"authority": "a"}, [("host", "a"), ("host", "b")]),
            ({"authority": "a:443"}, [("host", "a")]),
            ({"authority": None}, [("host", "a"), ("host", "a")]),
            ({"authority": None}, [("host", "")]),
            # Section 8.5.
            ({"method": "CONNECT"}, []),
            ({"method": "CONNECT", "scheme": None}, []),
            ({"method": "CONNECT", "scheme": None, "path": None, "authority": None}, []),
            # Section 8.2.1: names.
            ({}, [("X-A", "1")]),
            ({}, [("x-A", "1")]),
            ({}, [("", "1")]),
            ({}, [("x a", "1")]),
            ({}, [("x\0", "1")]),
            ({}, [("x\r\ny", "1")]),
            ({}, [("x:y", "1")]),
            ({}, [("x\xe9", "1")]),
            ({}, [("x\x7f", "1")]),
            ({}, [("x" * 1025, "1")]),
            # Section 8.2.1: values.
            ({}, [("x", " 1")]),
            ({}, [("x", "1 ")]),
            ({}, [("x", "\t1")]),
            ({}, [("x", "1\t")]),
            ({}, [("x", "a\r\nY: b")]),
            ({}, [("x", "a\nb")]),
            ({}, [("x", "a\rb")]),
            ({}, [("x", "a\0b")]),
            ({}, [("x", "a\x7fb")]),
            # Section 8.2.2.
            ({}, [("connection", "close")]),
            ({}, [("connection", "x")]),
            ({}, [("proxy-connection", "keep-alive")]),
            ({}, [("keep-alive", "timeout=5")]),
            ({}, [("transfer-encoding", "chunked")]),
            ({}, [("transfer-encoding", "identity")]),
            ({}, [("upgrade", "h2c")]),
            ({}, [("te", "gzip")]),
            ({}, [("te", "trailers, gzip")]),
            ({}, [("te", "trailers"), ("te", "trailers")]),
            ({}, [("te", "")]),
            # Section 8.1.1.
            ({}, [("content-length", "1")]),
            ({}, [("content-length", "")]),
            ({}, [("content-length", "+0")]),
            ({}, [("content-length", "-1")]),
            ({}, [("content-length", "0x0")]),
            ({}, [("content-length", "0"), ("content-length", "1")]),
            ({}, [("content-length", "9" * 19)]),
        ],
    )
    def test_what_is_malformed(self, changed, more):
        with pytest.raises(Malformed):
            head(*more, **changed)

    def test_a_name_that_was_refused_is_refused_again(self):
        for _ in range(2):
            with pytest.raises(Malformed):
                head(("connection", "x"))

    @pytest.mark.parametrize(
        ("more", "ended", "framing"),
        [
            ([], True, NO_BODY),
            ([], False, CHUNKED),
            ([("content-length", "0")], True, Framing(0, False)),
            ([("content-length", "0")], False, Framing(0, False)),
            ([("content-length", "5")], False, Framing(5, False)),
            ([("content-length", "5"), ("content-length", "5")], False, Framing(5, False)),
            ([("content-length", "5, 5")], False, Framing(5, False)),
        ],
    )
    def test_the_framing(self, more, ended, framing):
        found = head(*more, ended=ended)
        assert found.framing == framing
        assert found.headers.get("Content-Length") == (None if framing.length is None else str(framing.length))
        assert "Transfer-Encoding" not in found.headers

    @pytest.mark.parametrize(
        ("value", "ended", "expects"),
        [
            ("100-continue", False, True),
            ("100-Continue", False, True),
            ("100-continue", True, False),
            ("x", False, False),
        ],
    )
    def test_expectations(self, value, ended, expects):
        assert head(("expect", value), ended=ended).expects_continue is expects

    def test_crumbs_become_one_cookie(self):
        found = head(("cookie", "a=1"), ("x", "y"), ("cookie", "b=2"), ("cookie", "c=3; d=4"))
        assert found.headers.get_list("Cookie") == ["a=1; b=2; c=3; d=4"]

    def test_authority_is_the_host(self):
        assert head(authority="a:1").headers.get_list("Host") == ["a:1"]
        assert head(("host", "a:1"), authority="a:1").headers.get_list("Host") == ["a:1"]
        assert head(("host", "a:1"), authority=None).headers.get_list("Host") == ["a:1"]

    @pytest.mark.parametrize(
        ("changed", "status"),
        [({"method": "CONNECT", "scheme": None, "path": None}, 501), ({"path": "/" + "x" * 5000}, 431)],
    )
    def test_what_is_answered(self, changed, status):
        with pytest.raises(BadRequest) as caught:
            head(max_size=4096, **changed)
        assert caught.value.status_code == status

    def test_the_size_counts_32_octets_for_each_field(self):
        size = sum(len(name) + len(value) + 32 for name, value in fields(("x", "y")))
        assert head(("x", "y"), max_size=size)
        with pytest.raises(BadRequest):
            head(("x", "y"), max_size=size - 1)


class TestTrailers:
    def test_fields(self):
        fields = request_trailers([(b"grpc-status", b"0"), (b"x", b"")])
        assert list(fields.get_all()) == [("Grpc-Status", "0"), ("X", "")]

    @pytest.mark.parametrize("name", [b":path", b"X", b"connection", b"transfer-encoding", b"x y"])
    def test_none(self, name):
        with pytest.raises(Malformed):
            request_trailers([(name, b"1")])

    @pytest.mark.parametrize(("count", "size"), [(101, 1), (2, 8192)])
    def test_too_many(self, count, size):
        with pytest.raises(BadRequest) as caught:
            request_trailers([(b"x", b"y" * size)] * count)
        assert caught.value.status_code == 431

    def test_what_is_sent(self):
        headers = HTTPHeaders(
            {"Grpc-Status": "0", "Content-Length": "5", "Host": "a", "Trailer": "x", "Te": "trailers"}
        )
        assert http2_trailers(headers) == [(b"grpc-status", b"0")]


class TestResponses:
    def test_hop_by_hop_fields_stay_here(self):
        headers = HTTPHeaders({"Content-Type": "text/plain", "Connection": "close, X-Hop", "X-Hop": "1", "X": " y "})
        for name in ("Keep-Alive", "Proxy-Connection", "Transfer-Encoding", "Upgrade", "Te", "Trailer"):
            headers[name] = "x"
        headers.add("Set-Cookie", "a=1")
        headers.add("Set-Cookie", "b=\xe9")
        assert response_fields(200, headers) == [
            (b":status", b"200"),
            (b"content-type", b"text/plain"),
            (b"x", b"y"),
            (b"set-cookie", b"a=1"),
            (b"set-cookie", b"b=\xe9"),
        ]

    def test_what_will_not_come_again_is_kept_out_of_the_table(self):
        headers = HTTPHeaders({"Set-Cookie": "a=1", "Etag": "x", "Date": "today", "Server": "s"})
        kept_out = {name for name, value in map(tuple, [f for f in response_fields(200, headers) if never(f)])}
        assert kept_out == {b"set-cookie", b"etag", b"date"}

    @pytest.mark.parametrize("status", [101, 99, 1000])
    def test_not_every_status_can_be_sent(self, status):
        with pytest.raises(ValueError, match="status"):
            response_fields(status, HTTPHeaders())

    @pytest.mark.parametrize(
        ("name", "value"),
        [("X", "a\r\nb"), ("X", "a\nb"), ("X", "a\0"), ("X", "\u0100"), ("X Y", "a"), ("X:", "a"), ("", "a")],
    )
    def test_nothing_becomes_another_field(self, name, value):
        headers = HTTPHeaders()
        headers._as_list[name] = [value]
        headers._combined_cache[name] = value
        with pytest.raises(ValueError, match="Illegal characters"):
            response_fields(200, headers)


def never(field):
    return isinstance(field, NeverIndexedHeaderTuple)
