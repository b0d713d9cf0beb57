"""trailers: which fields behind a body pass."""

import pytest

from tornado_proxy.trailers import MAX_LINES, trailer_fields


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
