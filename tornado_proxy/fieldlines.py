"""Field lines, read and remembered: most of a head's lines were in the head before it.

A browser sends the same ``User-Agent`` and ``Accept`` with each request, an upstream the same ``Server`` and
``Content-Type`` with each response. A line that was found good once, and what it says, is kept; to look it up takes a
tenth of checking, decoding and splitting it. Others choose the lines, so there are limits to how many and how long.
Kept are only lines of fields that are known to come again and to hold nobody's secret: which fields do hold one
(X-Api-Key, Private-Token, ...) nobody can list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import AnyStr, Generic

from tornado.httputil import HTTPHeaders

from tornado_proxy.headers import ByName, made_of, spelled

# A line below a head's first, with its end; RFC 9112 section 2.2 lets a recipient take a bare LF for one.
_FIELD_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t\x20-\x7e\x80-\xff]*)\r?\n")

# Lines that are kept, and the length of the longest; about half a megabyte. Lines of a head beyond which it is not
# worth keeping any: a flood.
_MOST_LINES = 500
_LONGEST_LINE = 256
_MOST_OF_A_HEAD = 100

# What clients, the proxies in front of us, and upstreams say again and again.
_RECURRING = frozenset(
    {
        "Accept",
        "Accept-Charset",
        "Accept-Encoding",
        "Accept-Language",
        "Accept-Ranges",
        "Access-Control-Allow-Credentials",
        "Access-Control-Allow-Headers",
        "Access-Control-Allow-Methods",
        "Access-Control-Allow-Origin",
        "Age",
        "Allow",
        "Alt-Svc",
        "Cache-Control",
        "Connection",
        "Content-Encoding",
        "Content-Language",
        "Content-Length",
        "Content-Type",
        "Date",
        "Dnt",
        "Expect",
        "Expires",
        "Host",
        "Keep-Alive",
        "Pragma",
        "Priority",
        "Referrer-Policy",
        "Sec-Ch-Ua",
        "Sec-Ch-Ua-Mobile",
        "Sec-Ch-Ua-Platform",
        "Sec-Fetch-Dest",
        "Sec-Fetch-Mode",
        "Sec-Fetch-Site",
        "Sec-Fetch-User",
        "Sec-Gpc",
        "Server",
        "Strict-Transport-Security",
        "Te",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
        "Upgrade-Insecure-Requests",
        "User-Agent",
        "Vary",
        "Via",
        "X-Content-Type-Options",
        "X-Forwarded-Host",
        "X-Forwarded-Port",
        "X-Forwarded-Proto",
        "X-Frame-Options",
        "X-Powered-By",
        "X-Requested-With",
        "X-Xss-Protection",
    }
)


class FieldLines(Generic[AnyStr]):
    """Reads the lines of heads. Clients and upstreams have one each, so that the ones cannot fill the others'.

    ``read`` returns name and value of a line, as they came, and raises ``ValueError`` for what is none.
    """

    def __init__(self, read: Callable[[AnyStr], tuple[str, str]]) -> None:
        self._read: Callable[[AnyStr], tuple[str, str]] = read
        self._spelling = ByName(spelled)
        self._known: dict[AnyStr, tuple[str, str]] = {}

    def headers(self, lines: Sequence[AnyStr]) -> HTTPHeaders:
        """Return the fields of a head. Raises ``ValueError``."""
        values: dict[str, list[str]] = {}
        known = self._known
        for line in lines:
            name, value = known.get(line) or self._learn(line, len(lines))
            if name in values:
                values[name].append(value)
            else:
                values[name] = [value]
        return made_of(values)

    def _learn(self, line: AnyStr, of: int) -> tuple[str, str]:
        name, value = self._read(line)
        field = self._spelling[name], value.strip(" \t")
        if len(line) <= _LONGEST_LINE and of <= _MOST_OF_A_HEAD and field[0] in _RECURRING:
            if len(self._known) >= _MOST_LINES:
                # Whoever sends others each time must not keep out those who do not.
                self._known.clear()
            self._known[line] = field
        return field


def _read_received(line: bytes) -> tuple[str, str]:
    match = _FIELD_LINE.fullmatch(line)
    if match is None:
        raise ValueError("a header line is malformed")
    return match[1].decode("latin-1"), match[2].decode("latin-1")


_of_upstreams = FieldLines(_read_received)


def parse_fields(lines: Sequence[bytes]) -> HTTPHeaders:
    """Return the fields of a head that a client received, each line with its end (RFC 9112 section 5).

    Raises ``ValueError``.
    """
    return _of_upstreams.headers(lines)
