"""Which upstreams and request-targets we accept, and how they are joined."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornado_proxy.errors import BadRequest
from tornado_proxy.urls import (
    RequestTarget,
    check_tail,
    escapes_base,
    join_url,
    normalized_origin,
    parse_target,
    parse_upstream,
    prefix_above,
    split_url,
    tail_below,
)


class TestParseUpstream:
    @pytest.mark.parametrize(
        ("url", "scheme", "host", "port", "path", "query"),
        [
            ("http://example.com", "http", "example.com", None, "", ""),
            ("http://example.com/", "http", "example.com", None, "/", ""),
            ("HTTPS://Example.COM:8443/Bar/", "https", "example.com", 8443, "/Bar/", ""),
            ("http://h/a%2Fb/..//;x?k=%20&l", "http", "h", None, "/a%2Fb/..//;x", "k=%20&l"),
            ("http://h?x=/y", "http", "h", None, "", "x=/y"),
            ("http://h/?", "http", "h", None, "/", ""),
            ("ws://h/s", "http", "h", None, "/s", ""),
            ("Wss://h/s", "https", "h", None, "/s", ""),
            ("http://[::1]:9000/x", "http", "::1", 9000, "/x", ""),
            ("http://[2001:DB8::1]", "http", "2001:db8::1", None, "", ""),
            ("http://my_service:80", "http", "my_service", 80, "", ""),
            ("http://10.0.0.1", "http", "10.0.0.1", None, "", ""),
            ("http://h/a@b:c", "http", "h", None, "/a@b:c", ""),
        ],
    )
    def test_takes_a_url_apart(self, url: str, scheme: str, host: str, port: int | None, path: str, query: str) -> None:
        got = parse_upstream(url)
        assert (got.scheme, got.host, got.port, got.path, got.query) == (scheme, host, port, path, query)

    @pytest.mark.parametrize(
        ("url", "netloc", "origin", "port"),
        [
            ("http://h", "h", "http://h", 80),
            ("http://h:80", "h", "http://h", 80),
            ("http://h:443", "h:443", "http://h:443", 443),
            ("https://h:443", "h", "https://h", 443),
            ("wss://h", "h", "https://h", 443),
            ("http://[::1]", "[::1]", "http://[::1]", 80),
            ("http://[::1]:9000", "[::1]:9000", "http://[::1]:9000", 9000),
        ],
    )
    def test_knows_host_header_and_origin_without_a_default_port(
        self, url: str, netloc: str, origin: str, port: int
    ) -> None:
        got = parse_upstream(url)
        assert (got.netloc, got.origin, got.effective_port) == (netloc, origin, port)

    @pytest.mark.parametrize(
        ("inbound", "origin"),
        [
            (None, "http://h"),
            ("http", "http://h"),
            ("https", "https://h"),
            ("wss", "https://h"),
            ("HTTPS", "https://h"),
        ],
    )
    def test_takes_the_inbound_scheme_when_it_has_none(self, inbound: str | None, origin: str) -> None:
        assert parse_upstream("//h/x", inbound).origin == origin

    def test_keeps_its_own_scheme_when_it_has_one(self) -> None:
        assert parse_upstream("http://h", "https").scheme == "http"

    def test_keeps_an_explicit_port_under_the_inbound_scheme(self) -> None:
        assert parse_upstream("//h:80", "https").origin == "https://h:80"

    def test_is_cached_and_frozen(self) -> None:
        assert parse_upstream("http://cached/") is parse_upstream("http://cached/")
        with pytest.raises(dataclasses.FrozenInstanceError):
            parse_upstream("http://cached/").host = "other"  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("localhost:9000", "upstream 'localhost:9000' has no scheme; write 'http://localhost:9000'"),
            ("example.com/x", "upstream 'example.com/x' has no scheme; write 'http://example.com/x'"),
            ("", "upstream is empty; write 'http://host:port/path'"),
            ("/x", "upstream '/x' has no host; write 'http://host/x'"),
            ("http:/h/x", "upstream 'http:/h/x' lacks '//'; write 'http://h/x'"),
            ("ftp://h/", "upstream 'ftp://h/' has the scheme 'ftp'; use http, https, ws or wss"),
            (
                "http://u:secret@h/",
                "upstream 'http://***@h/' has a user name in it; put credentials in rewrite_request",
            ),
            ("http://::1", "upstream 'http://::1' has the invalid host '::1'; write '[::1]'"),
            ("http://h/a b", "upstream 'http://h/a b' has whitespace or a control character; percent-encode it"),
            ("http://h/#x", "upstream 'http://h/#x' has a fragment, which is never sent; remove '#' and what follows"),
            ("http://", "upstream 'http://' has no host; write 'http://host:port/path'"),
        ],
    )
    def test_says_what_is_wrong_and_what_to_write(self, url: str, message: str) -> None:
        with pytest.raises(ValueError, match=r"^upstream ") as caught:
            parse_upstream(url)
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        "url",
        [
            "http:///x",
            "http://:80/",
            "//",
            "///x",
            "://h",
            "http://h:",
            "http://h:0",
            "http://h:65536",
            "http://h:-1",
            "http://h:8_0",
            "http://h:80:81",
            "http://h:x",
            "http://@h",
            "http://h\\@evil",
            "http://h/\\x",
            "http://h\t/",
            "http://h/\r\nX: y",
            "http://h/\x7f",
            " http://h",
            "http://h/\xa0",
            "http://b\u00fccher.de",
            "http://h\u3002com",
            "http://[::1",
            "http://[::1]x",
            "http://[fe80::1%25eth0]",
            "http://[fe80::1%eth0]",
            "http://[h]",
            "http://[]",
            "http://a,b",
            "http://%31",
            "http://-h",
            "http://h#",
            "file:///etc/passwd",
            "javascript:alert(1)",
        ],
    )
    def test_refuses(self, url: str) -> None:
        with pytest.raises(ValueError, match="upstream"):
            parse_upstream(url)

    @pytest.mark.parametrize(
        "url", ["http://u:secret@h", "//u:secret@h", "u:secret@h", "ftp://u:secret@h/ x", "http://u:secret@h\n"]
    )
    def test_never_shows_a_password(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"^upstream ") as caught:
            parse_upstream(url)
        assert "secret" not in str(caught.value)

    @given(st.text())
    def test_raises_nothing_but_value_error(self, text: str) -> None:
        for url in (text, "http://" + text, "//" + text):
            try:
                upstream = parse_upstream(url)
            except ValueError:
                continue
            assert parse_upstream(upstream.origin).origin == upstream.origin


class TestParseTarget:
    @pytest.mark.parametrize(
        ("target", "path", "query"),
        [
            ("/", "/", None),
            ("/x?", "/x", ""),
            ("/x?a=1?b", "/x", "a=1?b"),
            ("//evil.com/x", "//evil.com/x", None),
            ("/a%2Fb/../;p//", "/a%2Fb/../;p//", None),
            ("/\xe9\x80\xff", "/\xe9\x80\xff", None),
            ("/@evil", "/@evil", None),
            ("/http://evil/", "/http://evil/", None),
            ("/\\evil", "/\\evil", None),
        ],
    )
    def test_keeps_origin_form_as_it_came(self, target: str, path: str, query: str | None) -> None:
        assert parse_target("GET", target) == RequestTarget(None, path, query)

    @pytest.mark.parametrize(
        ("target", "authority", "path", "query"),
        [
            ("http://a/x?y", "a", "/x", "y"),
            ("HTTPS://A:8443/x", "A:8443", "/x", None),
            ("http://a", "a", "/", None),
            ("http://a?x", "a", "/", "x"),
            ("http://a?", "a", "/", ""),
            ("http://[::1]:80//x", "[::1]:80", "//x", None),
            ("http://a/x@y", "a", "/x@y", None),
            ("http://a/?u=http://b/", "a", "/", "u=http://b/"),
        ],
    )
    def test_splits_the_authority_off_absolute_form(
        self, target: str, authority: str, path: str, query: str | None
    ) -> None:
        assert parse_target("GET", target) == RequestTarget(authority, path, query)

    def test_takes_a_url_without_a_path_for_the_asterisk_with_options_only(self) -> None:
        assert parse_target("OPTIONS", "http://h:1").path == "*"
        assert parse_target("OPTIONS", "http://h:1?").path == "/"
        assert parse_target("OPTIONS", "http://h:1/").path == "/"
        assert parse_target("GET", "http://h:1").path == "/"

    def test_takes_the_asterisk_with_options_only(self) -> None:
        assert parse_target("OPTIONS", "*") == RequestTarget(None, "*", None)
        with pytest.raises(BadRequest):
            parse_target("GET", "*")

    @pytest.mark.parametrize(
        "target",
        [
            "",
            "@evil/x",
            "\\evil",
            "x",
            "?x",
            "/a#b",
            "#",
            "/a b",
            "/a\tb",
            "/a\r\nX: y",
            "/\x00",
            "/\x7f",
            "/\u0100",
            "/a\n",
            "*/x",
            "evil:80",
            "ftp://a/",
            "http:/a",
            "http:a",
            "http://",
            "http:///x",
            "http://u@a/",
            "http://a\\b",
            "http://a\\@b/",
            "http://a:x/",
            "http://a:/",
            "http://[::1/",
            "http://\xe9/",
            "javascript:alert(1)",
        ],
    )
    def test_refuses(self, target: str) -> None:
        with pytest.raises(BadRequest):
            parse_target("GET", target)
        if target:
            with pytest.raises(BadRequest):
                parse_target("OPTIONS", target)

    @pytest.mark.parametrize("target", ["a:443", "/x", "http://a/", "*"])
    def test_refuses_connect(self, target: str) -> None:
        with pytest.raises(BadRequest):
            parse_target("CONNECT", target)

    def test_keeps_the_target_out_of_the_message(self) -> None:
        with pytest.raises(BadRequest) as caught:
            parse_target("GET", "/x?token=secret#")
        assert "secret" not in str(caught.value)

    @given(st.text(alphabet=st.characters(max_codepoint=0x120)))
    def test_never_loses_a_byte_of_origin_form(self, text: str) -> None:
        try:
            got = parse_target("GET", "/" + text)
        except BadRequest:
            return
        assert got.path + ("" if got.query is None else "?" + got.query) == "/" + text


class TestJoinUrl:
    @pytest.mark.parametrize(
        ("base", "tail", "joined"),
        [
            ("", "", "/"),
            ("", "/", "/"),
            ("", "/x", "/x"),
            ("/", "", "/"),
            ("/", "/x", "/x"),
            ("/bar", "", "/bar"),
            ("/bar", "/", "/bar/"),
            ("/bar", "/x", "/bar/x"),
            ("/bar", "x", "/bar/x"),
            ("/bar/", "", "/bar/"),
            ("/bar/", "/", "/bar/"),
            ("/bar/", "/x", "/bar/x"),
            ("/bar/", "x", "/bar/x"),
            ("/bar", "//x", "/bar//x"),
            ("/bar/", "//x", "/bar//x"),
            ("", "//evil.com", "//evil.com"),
            ("/bar", "/a%2Fb/../;p/\xe9", "/bar/a%2Fb/../;p/\xe9"),
            ("", "@evil", "/@evil"),
        ],
    )
    def test_puts_one_slash_between_base_and_tail(self, base: str, tail: str, joined: str) -> None:
        assert join_url(parse_upstream("http://h:9000" + base), tail, None) == "http://h:9000" + joined

    @pytest.mark.parametrize(
        ("own", "inbound", "suffix"),
        [
            ("", None, ""),
            ("", "", "?"),
            ("", "a=1", "?a=1"),
            ("?k=1", None, "?k=1"),
            ("?k=1", "", "?k=1"),
            ("?k=1", "a=1&a=2?%20", "?k=1&a=1&a=2?%20"),
        ],
    )
    def test_puts_the_upstreams_query_first(self, own: str, inbound: str | None, suffix: str) -> None:
        assert join_url(parse_upstream("http://h/x" + own), "", inbound) == "http://h/x" + suffix

    @given(st.text(alphabet="/.%2@:\\;x"), st.sampled_from(["", "/", "/bar", "/bar/"]))
    def test_never_changes_the_host(self, tail: str, base: str) -> None:
        upstream = parse_upstream("http://h:9000" + base)
        assert split_url(join_url(upstream, tail, None))[0] == "http://h:9000"


class TestEscapesBase:
    @pytest.mark.parametrize(
        "tail",
        [
            "/../secret",
            "/..",
            "..",
            "/%2e%2e/secret",
            "/.%2E/secret",
            "/%2e./secret",
            "/..%2fsecret",
            "/..%2Fsecret",
            "/..\\secret",
            "/..%5csecret",
            "/%2e%2e%5Csecret",
            "//../../secret",
            "//../secret",
            ";/../secret",
            "/..;/secret",
            "/..;x=1/secret",
            "/..%3b/secret",
            "/;x/../secret",
            "/./../secret",
            "/x/../../secret",
            "/x/../../app/y",
            "/x/y/../../..",
            "/%252e%252e/secret",
            "/%25252e%25252e%25252fsecret",
            "/%2e%2e%252fsecret",
            "/../app2",
        ],
    )
    def test_true_when_it_climbs(self, tail: str) -> None:
        assert escapes_base("/app", tail)
        assert escapes_base("/app/", tail)

    @pytest.mark.parametrize(
        "tail",
        ["", "/", "/x", "/x/..", "/x/../y", "/x/%2e%2e/y", "/...", "/..x", "/x..", "/a..b/c", "/.", "/%2e",
         "/%2ehidden", "/a%20b", "/x%2fy", "/x/y/../..", "/a%2Fb"],
    )  # fmt: skip
    def test_false_when_it_stays_below(self, tail: str) -> None:
        assert not escapes_base("/app", tail)

    @pytest.mark.parametrize("base", ["", "/", "//"])
    def test_false_when_nothing_is_above_the_base(self, base: str) -> None:
        assert not escapes_base(base, "/../../etc/passwd")

    def test_is_linear_in_layers_of_encoding(self) -> None:
        assert escapes_base("/app", "/" + ("%" + "25" * 30_000 + "2e") * 2)
        assert not escapes_base("/app", "/%" + "25" * 30_000)


class TestSplitUrl:
    @pytest.mark.parametrize(
        ("url", "parts"),
        [
            ("http://h:9000/x?y", ("http://h:9000", "h:9000", "/x?y")),
            ("http://h", ("http://h", "h", "/")),
            ("http://h?x", ("http://h", "h", "/?x")),
            ("http://h/?", ("http://h", "h", "/?")),
            ("HTTPS://H:443/X", ("https://h", "h", "/X")),
            ("http://[::1]:80/", ("http://[::1]", "[::1]", "/")),
            ("http://h//a/../%2e%2F;\xe9", ("http://h", "h", "//a/../%2e%2F;\xe9")),
            ("http://h/@x:y", ("http://h", "h", "/@x:y")),
        ],
    )
    def test_gives_origin_host_and_target(self, url: str, parts: tuple[str, str, str]) -> None:
        assert split_url(url) == parts

    def test_gives_the_asterisk_for_options_without_a_path(self) -> None:
        assert split_url("http://h:9000", "OPTIONS")[2] == "*"
        assert split_url("http://h:9000?x", "OPTIONS")[2] == "/?x"
        assert split_url("http://h:9000/", "OPTIONS")[2] == "/"

    @pytest.mark.parametrize(
        "url",
        ["", "/x", "h/x", "//h/x", "ftp://h/", "ws://h/", "http://", "http:///x", "http://h/a b", "http://h/#f",
         "http://h#f", "http://h/\r\nX: y", "http://h/x\n", "http://h\n", "http://h/\x00", "http://h/\u0100",
         "http://u:p@h/", "http://h\\x", "http://h\\@evil/", "http://h:x/", "http://\xe9/", "http://h /"],
    )  # fmt: skip
    def test_refuses(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"^(url|upstream) "):
            split_url(url)

    def test_never_shows_the_query_or_a_password(self) -> None:
        for url in ("http://h/?token=secret #", "http://u:secret@h/ "):
            with pytest.raises(ValueError, match=r"^(url|upstream) ") as caught:
                split_url(url)
            assert "secret" not in str(caught.value)


class TestMountTail:
    @pytest.mark.parametrize(
        ("prefix", "path", "tail"),
        [
            ("/foo", "/foo", ""),
            ("/foo", "/foo/", "/"),
            ("/foo", "/foo/x", "/x"),
            ("/foo", "/foo//x", "//x"),
            ("/foo", "/foobar", None),
            ("/foo", "/foo;x", None),
            ("/foo", "/fo", None),
            ("/foo", "/FOO/x", None),
            ("/foo", "/f%6fo/x", None),
            ("/foo", "/", None),
            ("/foo", "*", None),
            ("/foo/", "/foo", ""),
            ("/foo/", "/foo/x", "/x"),
            ("/a/b", "/a/b/c", "/c"),
            ("/", "/x", "/x"),
            ("/", "/", "/"),
            ("", "/x", "/x"),
            ("", "//x", "//x"),
        ],
    )
    def test_is_the_raw_path_below_the_prefix(self, prefix: str, path: str, tail: str | None) -> None:
        assert tail_below(prefix, path) == tail


class TestOrigins:
    @pytest.mark.parametrize(
        ("given", "normal"),
        [
            ("https://App.Example", "https://app.example"),
            ("https://app.example:443", "https://app.example"),
            ("http://app.example:80", "http://app.example"),
            ("http://app.example:443", "http://app.example:443"),
            ("http://[::1]:80", "http://[::1]"),
            ("http://[::1]:9000", "http://[::1]:9000"),
            ("chrome-extension://abc", "chrome-extension://abc"),
            ("null", "null"),
            (" https://a ", "https://a"),
        ],
    )
    def test_are_compared_in_one_form(self, given, normal):
        assert normalized_origin(given) == normal


class TestTails:
    @pytest.mark.parametrize("path", ["", "/", "/a%2Fb", "a", "//a;b", "/caf\xe9"])
    def test_a_raw_one_passes(self, path: str) -> None:
        check_tail(path)

    @pytest.mark.parametrize("path", ["/a b", "/a?b", "/a#b", "/\u20ac", "/a\n", None, b"/a"])
    def test_any_other_is_refused(self, path: str) -> None:
        with pytest.raises(ValueError, match="is not raw; percent-encode it"):
            check_tail(path)

    @pytest.mark.parametrize(
        ("tail", "path", "prefix"),
        [
            ("/x", "/p/x", "/p"),
            ("x", "/p/x", "/p"),
            ("/x", "/x", ""),
            ("/p/x", "/p/x", ""),
            ("//x", "/p//x", "/p"),
            ("/a%2Fb", "/p/a%2Fb", "/p"),
            ("", "/p/x", "/p/x"),
            ("/", "/p/", "/p"),
            ("/", "/p", "/p"),
            ("", "/", ""),
            ("/x", "/p/y", None),
            ("x", "/px", None),
            ("/a/b", "/p/a%2Fb", None),
        ],
    )
    def test_what_stands_before_one(self, tail: str, path: str, prefix: str | None) -> None:
        assert prefix_above(tail, path) == prefix
