"""trailers: which fields behind a body pass."""

import pytest

from tests.support.fields import headers_of
from tornado_proxy import trailers
from tornado_proxy.trailers import MAX_LINES, announced, field_lines, names_listed, trailer_fields, upstream_trailers


def pairs(*lines: bytes) -> list[tuple[str, str]]:
    return list(trailer_fields(list(lines)).get_all())


class TestTrailerFields:
    def test_values_order_and_repetition_are_kept(self):
        lines = [b"grpc-status: 0\r\n", b"X-A:1\r\n", b"grpc-message: \r\n", b"x-a:  2 \r\n", b"\r\n"]
        assert pairs(*lines) == [("Grpc-Status", "0"), ("X-A", "1"), ("X-A", "2"), ("Grpc-Message", "")]

    @pytest.mark.parametrize(
        "name",
        ["Content-Length", "transfer-encoding", "Trailer", "Host", "content-type", "Set-Cookie", "Te", "Keep-Alive"],
    )
    def test_some_say_nothing_behind_a_body(self, name):
        assert pairs(f"{name}: 5\r\n".encode(), b"X-B: 1\r\n") == [("X-B", "1")]

    def test_nor_does_what_they_nominate(self):
        assert pairs(b"Connection: x-a\r\n", b"X-A: 1\r\n", b"X-B: 1\r\n") == [("X-B", "1")]

    @pytest.mark.parametrize(
        "line", [b"no colon\r\n", b": no name\r\n", b"a b: 1\r\n", b" folded: 1\r\n", b"X-C: \0\r\n", b"X-C: a\rb\r\n"]
    )
    def test_one_that_is_malformed_ends_all_of_them(self, line):
        assert pairs(b"X-A: 1\r\n", line, b"X-B: 1\r\n") == []

    def test_too_many_are_none(self):
        lines = [b"X-%d: 1\r\n" % number for number in range(MAX_LINES)]
        assert len(pairs(*lines)) == MAX_LINES
        assert pairs(*lines, b"X-A: 1\r\n") == []

    def test_too_much_is_nothing(self):
        line = b"X-A: " + b"a" * 60_000 + b"\r\n"
        assert len(pairs(line)) == 1
        assert pairs(line, line) == []


def passed(trailers, head=(), sent=None, listed=None):
    """Return the names that pass, of pairs or names."""
    given = headers_of(*[(name, "1") if isinstance(name, str) else name for name in trailers])
    inbound = headers_of(*head)
    return list(upstream_trailers(given, inbound, inbound if sent is None else headers_of(*sent), listed))


NEVER = [
    # Framing, and the connection.
    *("Content-Length", "Transfer-Encoding", "Trailer", "Te", "Connection", "Keep-Alive", "Upgrade", "Http2-Settings"),
    *("Proxy-Connection", "Proxy-Authorization", "Proxy-Authenticate", "Proxy"),
    # Routing, and what proxies say.
    *("Host", "Via", "Forwarded", "X-Forwarded-For", "X-Forwarded-Anything", "X-Forwarded", "X-Real-Ip", "X-Client-Ip"),
    *("True-Client-Ip", "X-Original-Url", "X-Rewrite-Url", "X-Original-Host", "X-Scheme", "Front-End-Https"),
    *("Destination", "Cdn-Loop", "Early-Data"),
    # Controls, conditionals, negotiation.
    *("Cache-Control", "Expect", "Max-Forwards", "Pragma", "Range", "If-Match", "If-None-Match", "If-Modified-Since"),
    *("If-Unmodified-Since", "If-Range", "If-Anything", "If", "Accept", "Accept-Encoding", "Accept-Language"),
    *("X-Http-Method-Override", "X-Method-Override", "X-Http-Method", "Prefer", "Depth", "Overwrite", "Lock-Token"),
    # Who it is.
    *("Authorization", "Cookie", "Set-Cookie", "Www-Authenticate", "Origin", "Referer", "Sec-Fetch-Site"),
    *("Sec-Websocket-Key", "Access-Control-Request-Method"),
    # What the body is.
    *("Content-Type", "Content-Encoding", "Content-Range", "Content-Location", "Content-Md5", "Content-Disposition"),
    # What only answers say.
    *("Age", "Expires", "Date", "Location", "Retry-After", "Vary", "Warning"),
]


class TestUpstreamTrailers:
    def test_values_order_and_repetition_are_kept(self):
        given = headers_of(("X-A", "1"), ("grpc-x", ""), ("x-a", "\xe9, 2"), ("Content-Digest", "sha-256=:x:"))
        fields = upstream_trailers(given, headers_of(), headers_of())
        assert list(fields.get_all()) == [
            ("X-A", "1"),
            ("X-A", "\xe9, 2"),
            ("Grpc-X", ""),
            ("Content-Digest", "sha-256=:x:"),
        ]
        assert field_lines(fields) == [b"X-A: 1", b"X-A: \xe9, 2", b"Grpc-X: ", b"Content-Digest: sha-256=:x:"]
        assert field_lines(None) == []

    @pytest.mark.parametrize("name", NEVER)
    def test_some_have_no_place_behind_a_body(self, name):
        assert passed([name, name.lower(), name.upper(), name.replace("-", "_"), name.replace("-", "."), "X-B"]) == [
            "X-B"
        ]

    @pytest.mark.parametrize("name", NEVER)
    def test_nor_where_a_hook_lists_them(self, name):
        assert passed([name], listed=frozenset([name])) == []

    @pytest.mark.parametrize("name", ["Content_Digest", "Content.Digest"])
    def test_what_looks_like_the_exception_is_none(self, name):
        assert passed([name]) == []

    @pytest.mark.parametrize("name", ["X-User", "x-user", "X_User", "X.User", "X~User", "x_USER"])
    def test_none_that_the_head_had(self, name):
        assert passed([name, "X-B"], head=[("X-User", "a")], sent=[]) == ["X-B"]
        assert passed([name, "X-B"], head=[("x_user", "a")], sent=[]) == ["X-B"]

    @pytest.mark.parametrize("name", ["X-User", "x_user"])
    def test_none_that_the_proxy_has_added(self, name):
        assert passed([name, "X-B"], sent=[("X-User", "a")]) == ["X-B"]

    @pytest.mark.parametrize("name", ["X-Hop", "x_hop", "Etag"])
    def test_none_that_connection_nominates(self, name):
        """Not even what it may not nominate: nobody needs it behind a body."""
        head = [("Connection", "keep-alive,\tX-Hop"), ("Connection", "ETag")]
        assert passed([name, "X-B"], head=head) == ["X-B"]
        assert passed([*head, name, "X-B"]) == ["X-B"]

    def test_only_those_that_are_listed(self):
        assert passed(["X-A", "X-B", "X_B", "X-C"], listed=frozenset({"X-B", "X-C"}), head=[("X-C", "1")]) == ["X-B"]
        assert passed(["X-A"], listed=frozenset()) == []


class TestAnnounced:
    @pytest.mark.parametrize(
        ("lines", "names"),
        [
            (["X-A"], "X-A"),
            (["x-a,X-B ,, x-A", "X-C"], "X-A, X-B, X-C"),
            (["X-A, Content-Length, x_forwarded_for, Host"], "X-A"),
            (["X-Head, x_head, X-Hop, X-A"], "X-A"),
            (["Trailer, Connection"], ""),
            (["a b, \xe9, x:y, X-A"], "X-A"),
            ([""], ""),
            ([], ""),
        ],
    )
    def test_what_can_pass(self, lines, names):
        head = headers_of(*[("Trailer", line) for line in lines], ("X-Head", "1"), ("Connection", "x-hop"))
        assert announced(head) == names

    def test_no_more_than_there_can_be(self):
        """It is a hint, and 64 KB of it would be work."""
        names = [f"X-{number}" for number in range(MAX_LINES + 1)]
        assert announced(headers_of(("Trailer", ", ".join(names)))) == ", ".join(names[:-1])

    def test_a_name_is_looked_at_once_however_often_it_is_nominated(self, monkeypatch):
        looked_at = []
        plain = trailers._plain
        monkeypatch.setattr(trailers, "_plain", lambda name: (looked_at.append(name), plain(name))[1])
        assert (
            announced(headers_of(("Trailer", "X-A"), ("Connection", "a," * 10_000), ("Connection", "," * 10_000)))
            == "X-A"
        )
        assert len(looked_at) < 10

    def test_what_a_hook_lists(self):
        assert list(names_listed(headers_of(("Trailer", "x-a, X-B"), ("trailer", "x-a,content-length")))) == [
            "X-A",
            "X-B",
            "Content-Length",
        ]
