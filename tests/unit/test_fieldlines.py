"""fieldlines: what lines say, and which are remembered."""

from __future__ import annotations

import pytest
from tornado.httputil import HTTPHeaders

from tests.support.fields import pairs
from tornado_proxy import fieldlines
from tornado_proxy.fieldlines import FieldLines, parse_fields


def parsed(*lines: bytes) -> list[tuple[str, str]]:
    return pairs(parse_fields(list(lines)))


class TestParseFields:
    def test_keeps_order_repetition_and_bytes(self) -> None:
        lines = (b"Set-Cookie: a=1\r\n", b"X:\r\n", b"set-cookie:  b=2 \t\r\n", b"Y: \xe9:\x85 z\n")
        assert parsed(*lines) == [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("X", ""), ("Y", "\xe9:\x85 z")]

    def test_takes_a_head_without_fields(self) -> None:
        assert parsed() == []

    @pytest.mark.parametrize(
        "line",
        [b"no colon\r\n", b": x\r\n", b"a b: x\r\n", b"a : x\r\n", b" a: x\r\n", b"a: \x00\r\n", b"a: b\rc\r\n",
         b"a: \x7f\r\n", b"\xe9: x\r\n", b"a: x", b"\r\n"],
    )  # fmt: skip
    def test_refuses_what_is_no_field(self, line: bytes) -> None:
        with pytest.raises(ValueError, match="malformed"):
            parsed(b"A: 1\r\n", line)

    def test_makes_what_add_would_make(self) -> None:
        lines = [("Set-Cookie", "a"), ("x-y", "1, 2"), ("SET-COOKIE", "b"), ("ETag", '"1"')]
        added, parsed = HTTPHeaders(), parse_fields([f"{name}: {value}\r\n".encode() for name, value in lines])
        for name, value in lines:
            added.add(name, value)
        assert vars(parsed).keys() == vars(added).keys()
        assert pairs(parsed) == pairs(added)
        for headers in (added, parsed):
            headers.add("Set-Cookie", "c")
            headers["X-Y"] = "3"
            del headers["Etag"]
        assert pairs(parsed) == pairs(added)
        assert parsed == added
        assert parsed["set-cookie"] == "a,b,c"

    def test_is_quick_with_the_largest_head(self) -> None:
        assert len(parsed(*[b"a:" + b" " * 50 + b"\r\n"] * 5000)) == 5000


class TestMemory:
    @pytest.fixture
    def fields(self) -> FieldLines[str]:
        self.read: list[str] = []

        def read(line: str) -> tuple[str, str]:
            self.read.append(line)
            name, colon, value = line.partition(":")
            if not colon:
                raise ValueError("malformed")
            return name, value

        return FieldLines(read)

    def test_a_line_is_read_once(self, fields: FieldLines[str]) -> None:
        for _ in range(3):
            assert pairs(fields.headers(["accept: text/html", "X-A:1", "X-A: 2"])) == [
                ("Accept", "text/html"), ("X-A", "1"), ("X-A", "2"),
            ]  # fmt: skip
        assert self.read == ["accept: text/html", "X-A:1", "X-A: 2", *["X-A:1", "X-A: 2"] * 2]

    def test_what_is_no_line_is_refused_each_time(self, fields: FieldLines[str]) -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="malformed"):
                fields.headers(["no colon"])

    def test_headers_can_be_changed_without_changing_what_is_remembered(self, fields: FieldLines[str]) -> None:
        first = fields.headers(["Via: 1"])
        first.add("Via", "2")
        first["B"] = "3"
        assert pairs(fields.headers(["Via: 1"])) == [("Via", "1")]

    @pytest.mark.parametrize(
        "name",
        ["Authorization", "cookie", "Set-Cookie", "PROXY-AUTHORIZATION", "Authentication-Info", "X-Api-Key", "Referer",
         "Location", "X-Amz-Security-Token", "Sec-WebSocket-Protocol", "Content-Security-Policy", "X-Whatever"],
    )  # fmt: skip
    def test_secrets_are_not_kept(self, fields: FieldLines[str], name: str) -> None:
        fields.headers([f"{name}: secret"])
        assert "secret" not in repr(vars(fields))

    def test_nor_long_lines(self, fields: FieldLines[str]) -> None:
        fields.headers(["Accept: " + "x" * fieldlines._LONGEST_LINE])
        assert not fields._known

    def test_nor_a_flood_of_them(self, fields: FieldLines[str]) -> None:
        fields.headers([f"Accept: {n}" for n in range(fieldlines._MOST_OF_A_HEAD + 1)])
        assert not fields._known

    def test_others_cannot_fill_it(self, fields: FieldLines[str]) -> None:
        for n in range(3000):
            fields.headers([f"x-{n}: 1", f"{'y' * 100}{n}: 2", f"Via: {n}"])
        assert 0 < len(fields._known) <= fieldlines._MOST_LINES
        assert len(fields._spelling) <= 1000
        assert max(map(len, fields._spelling)) <= 64
        fields.headers(["Accept: */*"])
        self.read.clear()
        fields.headers(["Accept: */*"])
        assert self.read == []
