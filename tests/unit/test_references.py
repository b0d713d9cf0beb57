"""What points at the upstream in a response: Location, Refresh and Set-Cookie."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornado_proxy.references import rewrite_location, rewrite_refresh, rewrite_set_cookie
from tornado_proxy.urls import parse_upstream


def locate(
    value: str, upstream: str = "http://up:9000/bar", mount: str | None = "/foo", host: str | None = "pub.com"
) -> str:
    return rewrite_location(value, upstream=parse_upstream(upstream), mount=mount, scheme="https", host=host)


class TestRewriteLocation:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("http://up:9000/bar", "https://pub.com/foo"),
            ("http://up:9000/bar/", "https://pub.com/foo/"),
            ("HTTP://UP:9000/bar/x?y=/bar#/bar", "https://pub.com/foo/x?y=/bar#/bar"),
            ("http://up:9000/bar?", "https://pub.com/foo?"),
            ("//up:9000/bar/x", "//pub.com/foo/x"),
            ("/bar", "/foo"),
            ("/bar/", "/foo/"),
            ("/bar/x?y#z", "/foo/x?y#z"),
            ("/bar?x", "/foo?x"),
            ("/bar#", "/foo#"),
            ("/bar//x/../%2F;\xe9", "/foo//x/../%2F;\xe9"),
        ],
    )
    def test_brings_what_is_below_the_base_under_the_mount(self, value: str, expected: str) -> None:
        assert locate(value) == expected

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("http://up:9000/bar/x?y#z", "/x?y#z"),
            ("//up:9000/bar/x", "/x"),
            ("http://up:9000/bar?x", "/?x"),
            ("http://up:9000/bar//evil/x", "/.//evil/x"),
            ("http://up:9000/bar/\\evil", "/./\\evil"),
            ("http://evil/bar/x", "http://evil/bar/x"),
        ],
    )
    def test_becomes_a_path_where_no_host_was_named(self, value: str, expected: str) -> None:
        assert locate(value, mount="/", host=None) == expected

    @pytest.mark.parametrize(
        "value",
        [
            "", "x", "x/y", "../x", "?q", "#f", "/", "/barbar", "/other", "/foo/x", "/BAR/x",
            "http://up:9000", "http://up:9000/", "http://up:9000/barbar", "http://up:9000/foo/x",
            "http://up/bar", "http://up:9001/bar", "https://up:9000/bar", "http://evil/bar", "http://evil.com",
            "http://up:9000@evil/bar", "http://u@up:9000/bar", "http://up:9000\\@evil/bar", "//evil/bar", "///bar",
            "http:/bar", "http:bar", "mailto:x@up", "javascript:alert(1)", "ftp://up:9000/bar", "http://", "//",
            "http://[::1/bar", "http://up:x/bar", "http://up:99999999/bar", "/bar/\t/evil", "/bar\r\nX: y", "\\bar",
        ],
    )  # fmt: skip
    def test_leaves_all_else_byte_for_byte(self, value: str) -> None:
        assert locate(value) == value

    @pytest.mark.parametrize(
        ("upstream", "mount", "value", "expected"),
        [
            ("http://up", "/foo", "/x", "/foo/x"),
            ("http://up", "/foo", "/", "/foo/"),
            ("http://up/", "/foo", "/x", "/foo/x"),
            ("http://up", "/foo/", "/x", "/foo/x"),
            ("http://up", "/foo", "/foo/x", "/foo/x"),
            ("http://up", "/foo", "/foo", "/foo"),
            ("http://up", "/foo", "/foobar", "/foo/foobar"),
            ("http://up", "/foo", "http://up", "https://pub.com/foo"),
            ("http://up", "/foo", "http://up:80/x", "https://pub.com/foo/x"),
            ("http://up", "/foo", "http://up:/x", "https://pub.com/foo/x"),
            ("http://up", "/foo", "http://up/foo/x", "https://pub.com/foo/x"),
            ("http://up", "/foo", "http://up?x", "https://pub.com/foo?x"),
            ("http://up", "/", "/x", "/x"),
            ("http://up", "/", "//up/x", "//pub.com/x"),
            ("http://up", "/", "http://up", "https://pub.com/"),
            ("http://up/bar", "/", "/bar", "/"),
            ("http://up/bar", "/", "/bar/x", "/x"),
            ("http://up/bar/", "/foo", "/bar/x", "/foo/x"),
            ("http://up/bar/", "/foo", "/bar", "/foo"),
            ("http://up/same", "/same", "/same/x", "/same/x"),
            ("http://up/bar", "/bar/baz", "/bar/x", "/bar/baz/x"),
            ("https://up", "/foo", "https://up:443/x", "https://pub.com/foo/x"),
            ("http://[::1]:9000", "/foo", "http://[::1]:9000/x", "https://pub.com/foo/x"),
        ],
    )
    def test_knows_all_shapes_of_base_and_mount(self, upstream: str, mount: str, value: str, expected: str) -> None:
        assert locate(value, upstream, mount) == expected

    @pytest.mark.parametrize(
        ("upstream", "value", "expected"),
        [
            ("http://up", "http://up/x", "https://pub.com/x"),
            ("http://up/", "//up/x", "//pub.com/x"),
            ("http://up", "/x", "/x"),
            ("http://up/bar", "http://up/bar/x", "http://up/bar/x"),
            ("http://up/bar", "/bar/x", "/bar/x"),
        ],
    )
    def test_replaces_the_origin_only_when_the_mount_is_not_known(
        self, upstream: str, value: str, expected: str
    ) -> None:
        assert locate(value, upstream, None) == expected

    @pytest.mark.parametrize(
        ("value", "expected"), [("/bar//evil.com", "/.//evil.com"), ("/bar/\\evil.com", "/./\\evil.com")]
    )
    def test_never_turns_a_path_into_a_host(self, value: str, expected: str) -> None:
        assert locate(value, "http://up/bar", "/") == expected

    @given(st.text(), st.sampled_from(["http://up", "http://up/bar"]), st.sampled_from([None, "", "/", "/foo"]))
    def test_never_raises(self, value: str, upstream: str, mount: str | None) -> None:
        for candidate in (value, "//" + value, "http://" + value, "/bar" + value):
            assert isinstance(locate(candidate, upstream, mount), str)


class TestRewriteRefresh:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("5; url=/bar/x", "5; url=/foo/x"),
            ("0;URL=http://up:9000/bar", "0;URL=https://pub.com/foo"),
            ("0 ; Url = '/bar/x' ", "0 ; Url = '/foo/x' "),
            ('0;url="/bar/x";y', '0;url="/foo/x";y'),
            ('0;url="/bar/x', '0;url="/foo/x'),
            ("1.5, url=/bar?a=url=/bar", "1.5, url=/foo?a=url=/bar"),
            ("0 url=/bar", "0 url=/foo"),
            ("5", "5"),
            ("", ""),
            ("5; /bar", "5; /bar"),
            ("5; url=", "5; url="),
            ("5; url=x", "5; url=x"),
            ("5; url=http://evil/bar", "5; url=http://evil/bar"),
        ],
    )
    def test_rewrites_the_url_only(self, value: str, expected: str) -> None:
        upstream = parse_upstream("http://up:9000/bar")
        got = rewrite_refresh(value, upstream=upstream, mount="/foo", scheme="https", host="pub.com")
        assert got == expected

    def test_takes_linear_time(self) -> None:
        start = time.perf_counter()
        upstream = parse_upstream("http://up")
        rewrite_refresh(
            "5" + " " * 60_000 + ";" + " " * 60_000 + "x", upstream=upstream, mount="/", scheme="http", host="a"
        )
        assert time.perf_counter() - start < 1


class TestRewriteSetCookie:
    @pytest.mark.parametrize(
        ("base", "mount", "path", "expected"),
        [
            ("/bar", "/foo", "/bar", "/foo"),
            ("/bar", "/foo", "/bar/", "/foo/"),
            ("/bar", "/foo", "/bar/x", "/foo/x"),
            ("/bar/", "/foo", "/bar/", "/foo"),
            ("/bar/", "/foo", "/bar", "/foo"),
            ("/bar", "/foo", "/barbar", "/barbar"),
            ("/bar", "/foo", "/", "/"),
            ("/bar", "/foo", "/foo/x", "/foo/x"),
            ("/bar", "/", "/bar", "/"),
            ("/bar", "/", "/bar/x", "/x"),
            ("", "/foo", "/", "/foo"),
            ("/", "/foo", "/", "/foo"),
            ("", "/foo", "/x", "/foo/x"),
            ("", "/foo", "/foo", "/foo"),
            ("", "/foo", "/foo/x", "/foo/x"),
            ("", "/foo", "/foobar", "/foo/foobar"),
            ("", "/foo", "", ""),
            ("", "/foo", "x", "x"),
            ("", "/", "/x", "/x"),
            ("/bar", None, "/bar", "/bar"),
            ("", None, "/", "/"),
        ],
    )
    def test_brings_the_path_under_the_mount(self, base: str, mount: str | None, path: str, expected: str) -> None:
        got = rewrite_set_cookie(f"a=b; Path={path}; Secure", base=base, mount=mount)
        assert got == f"a=b; Path={expected}; Secure"

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("a=/bar", "a=/bar"),
            ("a=b; PATH = /bar ;HttpOnly", "a=b; PATH=/foo;HttpOnly"),
            ("a=b;path=/bar", "a=b;path=/foo"),
            ("a=b; Path", "a=b; Path"),
            ("path=/bar; Domain=up", "path=/bar; Domain=up"),
            ("a=b; Expires=Wed, 21 Oct 2015 07:28:00 GMT; Path=/bar; Max-Age=1; SameSite=Lax; Odd;;",
             "a=b; Expires=Wed, 21 Oct 2015 07:28:00 GMT; Path=/foo; Max-Age=1; SameSite=Lax; Odd;;"),
            ("a=b; Path = /other ", "a=b; Path = /other "),
            ("", ""),
            (";", ";"),
            ('a="x; Path=/bar"', 'a="x; Path=/bar"'),
        ],
    )  # fmt: skip
    def test_leaves_all_else_byte_for_byte(self, value: str, expected: str) -> None:
        assert rewrite_set_cookie(value, base="/bar", mount="/foo") == expected

    def test_replaces_path_and_domain_where_they_are(self) -> None:
        got = rewrite_set_cookie("a=b; domain=up; Path=/x", base="", mount="/foo", domain="pub.com", path="/p")
        assert got == "a=b; domain=pub.com; Path=/p"

    def test_adds_neither_path_nor_domain(self) -> None:
        assert rewrite_set_cookie("a=b; Secure", base="", mount="/foo", domain="d", path="/p") == "a=b; Secure"

    def test_leaves_a_host_cookie_valid(self) -> None:
        value = "__Host-id=1; Path=/; Secure"
        assert rewrite_set_cookie(value, base="", mount="/foo", path="/p") == value

    @given(st.text())
    def test_never_raises(self, value: str) -> None:
        assert isinstance(rewrite_set_cookie(value, base="/bar", mount="/foo"), str)
