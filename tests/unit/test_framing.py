"""Our verdict on message framing, RFC 9112 section 6."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tornado.httputil import HTTPHeaders

from tornado_proxy import framing
from tornado_proxy.errors import BadRequest, InvalidResponse
from tornado_proxy.framing import NO_BODY, Framing, request_framing


def make(*fields: tuple[str, str]) -> HTTPHeaders:
    headers = HTTPHeaders()
    for name, value in fields:
        # Not add(): that refuses some of the values that we want to judge, and other front ends do not.
        if name in headers:
            headers.get_list(name).append(value)
        else:
            headers[name] = value
    return headers


def lengths(*values: str) -> HTTPHeaders:
    return make(*(("Content-Length", value) for value in values))


def codings(*values: str) -> HTTPHeaders:
    return make(*(("Transfer-Encoding", value) for value in values))


INVALID_LENGTHS = [
    ("",),
    ("+5",),
    ("-5",),
    ("5_0",),
    ("0x5",),
    ("5 0",),
    ("5;",),
    ("5,",),
    (",5",),
    ("5, 6",),
    ("5", "6"),
    ("5", "05"),
    ("5", ""),
    ("\u0665",),
    ("\xb2",),
    ("1" * 19,),
    ("5\x0b",),
    ("5\x85",),
    ("five",),
    ("5.0",),
]


class TestARequestWithoutFraming:
    @pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
    def test_has_no_body(self, version: str) -> None:
        assert request_framing(version, make(("Host", "a"))) is NO_BODY
        assert not NO_BODY.has_body


class TestContentLength:
    @pytest.mark.parametrize(
        ("values", "length"),
        [
            (("5",), 5),
            (("0",), 0),
            (("005",), 5),
            (("5", "5"), 5),
            (("5, 5",), 5),
            (("5,5", "5"), 5),
            (("9" * 18,), 10**18 - 1),
        ],
    )
    def test_is_one_number_however_often_it_is_said(self, values: tuple[str, ...], length: int) -> None:
        assert request_framing("HTTP/1.1", lengths(*values)) == Framing(length, False)

    @pytest.mark.parametrize("values", INVALID_LENGTHS)
    def test_that_is_invalid_or_contradictory_is_refused(self, values: tuple[str, ...]) -> None:
        with pytest.raises(BadRequest) as caught:
            request_framing("HTTP/1.1", lengths(*values))
        assert caught.value.status_code == 400

    def test_of_zero_is_declared_but_no_body(self) -> None:
        verdict = request_framing("HTTP/1.1", lengths("0"))
        assert verdict != NO_BODY
        assert not verdict.has_body

    def test_above_zero_is_a_body(self) -> None:
        assert request_framing("HTTP/1.0", lengths("1")).has_body

    @given(st.text())
    def test_never_raises_anything_else(self, value: str) -> None:
        try:
            length = request_framing("HTTP/1.1", lengths(value)).length
        except BadRequest:
            return
        assert length is not None
        assert length >= 0


class TestTransferEncoding:
    @pytest.mark.parametrize("value", ["chunked", "Chunked", "CHUNKED", " chunked\t"])
    def test_is_accepted_when_it_is_chunked(self, value: str) -> None:
        verdict = request_framing("HTTP/1.1", codings(value))
        assert verdict == Framing(None, True)
        assert verdict.has_body

    @pytest.mark.parametrize("value", ["xchunked", "gzip", "identity", "gzip, chunked", "gzip, deflate, chunked"])
    def test_of_another_coding_is_not_implemented(self, value: str) -> None:
        with pytest.raises(BadRequest) as caught:
            request_framing("HTTP/1.1", codings(value))
        assert caught.value.status_code == 501
        assert BadRequest.status_code == 400

    @pytest.mark.parametrize(
        "values",
        [
            ("",),
            ("chunked, chunked",),
            ("chunked", "chunked"),
            ("chunked", "identity"),
            ("chunked, gzip",),
            ("chunked,",),
            (",chunked",),
            ("\x0bchunked",),
            ("chunked\x85",),
            ("\xa0chunked",),
            ('"chunked"',),
            ("chunked;q=1",),
            ("chu nked",),
            ("chunked\x00",),
            ("chun\u212aed",),
        ],
    )
    def test_that_is_malformed_is_a_bad_request(self, values: tuple[str, ...]) -> None:
        with pytest.raises(BadRequest) as caught:
            request_framing("HTTP/1.1", codings(*values))
        assert caught.value.status_code == 400

    @pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0"])
    def test_belongs_to_http_1_1(self, version: str) -> None:
        with pytest.raises(BadRequest):
            request_framing(version, codings("chunked"))

    @pytest.mark.parametrize("coding", ["chunked", "gzip", ""])
    def test_beside_a_length_is_refused(self, coding: str) -> None:
        with pytest.raises(BadRequest) as caught:
            request_framing("HTTP/1.1", make(("Transfer-Encoding", coding), ("Content-Length", "5")))
        assert caught.value.status_code == 400


class TestResponseMayHaveBody:
    @pytest.mark.parametrize(
        ("method", "status", "may"),
        [
            ("GET", 200, True),
            ("POST", 201, True),
            ("GET", 205, True),
            ("GET", 206, True),
            ("GET", 404, True),
            ("GET", 100, False),
            ("GET", 101, False),
            ("GET", 199, False),
            ("GET", 204, False),
            ("GET", 304, False),
            ("HEAD", 200, False),
            ("HEAD", 404, False),
            ("CONNECT", 200, False),
            ("CONNECT", 299, False),
            ("CONNECT", 403, True),
            ("head", 200, True),
        ],
    )
    def test_follows_rfc_9110_6_4_1(self, method: str, status: int, may: bool) -> None:
        assert framing.response_may_have_body(method, status) is may


class TestResponseLength:
    def test_is_what_the_upstream_declared(self) -> None:
        assert framing.response_length(lengths("12")) == 12
        assert framing.response_length(lengths("0")) == 0

    def test_is_unknown_without_the_field(self) -> None:
        assert framing.response_length(make()) is None

    def test_is_overridden_by_transfer_encoding(self) -> None:
        assert framing.response_length(make(("Content-Length", "5"), ("Transfer-Encoding", "chunked"))) is None

    @pytest.mark.parametrize("values", INVALID_LENGTHS)
    def test_that_is_invalid_is_the_upstreams_fault(self, values: tuple[str, ...]) -> None:
        with pytest.raises(InvalidResponse):
            framing.response_length(lengths(*values))


class TestWhatMayBeSent:
    @pytest.mark.parametrize("name", ["GET", "x", "X-A_b", "!#$%&'*+-.^_`|~", "PROPFIND", "M-SEARCH"])
    def test_a_token(self, name: str) -> None:
        assert framing.is_token(name)

    @pytest.mark.parametrize("name", ["", "GET ", "G T", "GET\n", "A:", "a(b", "é", "a\x00", "a/b", '"a"', "a,b"])
    def test_not_a_token(self, name: str) -> None:
        assert not framing.is_token(name)

    @pytest.mark.parametrize("value", ["", "a", "a b", "a\tb", "\xe9\xff\x80", "~!", " a "])
    def test_a_value(self, value: str) -> None:
        assert framing.header_value_ok(value)

    @pytest.mark.parametrize("value", ["a\r\nX: y", "\r", "\n", "a\n", "\x00", "\x1f", "\x7f", "\u0100", "\u010a"])
    def test_not_a_value(self, value: str) -> None:
        assert not framing.header_value_ok(value)

    @given(st.text())
    def test_a_good_value_survives_latin1_without_a_line_end(self, value: str) -> None:
        if framing.header_value_ok(value):
            assert not set(value.encode("latin1")) & {0, 10, 13}
