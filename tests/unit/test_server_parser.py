"""The parts of the server's parser that need no socket; what it accepts and refuses is in ``tests/server``."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tornado.httputil import HTTPHeaders

from tornado_proxy.errors import BadRequest
from tornado_proxy.server.parser import ChunkedBody, SizedBody, parse_head

TOKEN = st.text("abcXYZ-_!~09", min_size=1, max_size=8)
VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=12).filter(
    lambda value: not any(0x7F <= ord(char) < 0xA0 for char in value)
)
FIELDS = st.lists(st.tuples(TOKEN, VALUE), max_size=8)


class TestHeaders:
    @given(FIELDS)
    def test_they_are_what_tornado_would_have_built(self, fields):
        fields = [(f"x{name}", value.strip(" \t")) for name, value in fields]
        ours = parse_head("GET / HTTP/1.0" + "".join(f"\r\n{name}: {value}" for name, value in fields)).headers
        theirs = HTTPHeaders()
        for name, value in fields:
            theirs.add(name, value)
        assert ours.__dict__.keys() == theirs.__dict__.keys()
        assert list(ours.get_all()) == list(theirs.get_all())
        assert dict(ours) == dict(theirs)

    @given(st.binary(max_size=60))
    def test_what_passes_passes_a_strict_parser_too(self, junk):
        text = "GET / HTTP/1.1\r\nHost: a\r\nX: " + junk.decode("latin-1")
        try:
            parse_head(text)
        except BadRequest:
            return
        strict = h11.Connection(h11.SERVER)
        strict.receive_data(text.encode("latin-1") + b"\r\n\r\n")
        assert isinstance(strict.next_event(), h11.Request)


class TestBodies:
    @given(st.lists(st.binary(min_size=1, max_size=30), max_size=6), st.lists(st.integers(1, 20), max_size=30))
    def test_chunks_come_out_as_they_went_in_however_they_are_cut(self, pieces, cuts):
        wire = b"".join(b"%x;e\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nT: v\r\n\r\nNEXT"
        body, data, content = ChunkedBody(), bytearray(), b""
        for cut in [*cuts, len(wire)]:
            data += wire[:cut]
            wire = wire[cut:]
            content += body.take(data)
        assert body.done
        assert content == b"".join(pieces)
        assert data == b"NEXT"

    @pytest.mark.parametrize("length", [0, 1, 5])
    def test_a_sized_body_leaves_what_follows(self, length):
        body, data = SizedBody(length), bytearray(b"hello world")
        assert body.done == (length == 0)
        assert body.take(data) == b"hello world"[:length]
        assert body.done
        assert data == b"hello world"[length:]
