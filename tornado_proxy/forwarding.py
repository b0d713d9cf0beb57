"""What a gateway says of who asked (X-Forwarded-*, Forwarded; RFC 7239) and of itself (Via; RFC 9110 section 7.6.3).

Pure functions, as in `headers`. They add to a head that was cleaned before: a client's ``Connection: X-Forwarded-For``
must not remove what is said here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from tornado.httputil import HTTPHeaders

from tornado_proxy.headers import TOKEN, lines_of, put, put_missing

_X_FORWARDED = frozenset(
    {"X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port", "X-Forwarded-Prefix"}
)

_COMMENT_PARTS = re.compile(r"\\.?|[()]|[^()\\]+", re.DOTALL)


@dataclass(frozen=True)
class Forwarding:
    """What the upstream shall know about the inbound request.

    ``client`` is the address of whoever is connected to us, or ``"unknown"``; ``host`` the inbound Host, ``port`` the
    port that the client asked for and ``prefix`` the mount, each ``None`` where there is none.
    """

    client: str
    scheme: str
    host: str | None
    port: int | None
    prefix: str | None

    @cached_property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """What was asked for, as far as there is something to say: names and values of X-Forwarded-*, without -For."""
        fields = {
            "X-Forwarded-Proto": self.scheme,
            "X-Forwarded-Host": self.host,
            "X-Forwarded-Port": None if self.port is None else str(self.port),
            "X-Forwarded-Prefix": self.prefix,
        }
        return tuple((name, value) for name, value in fields.items() if value is not None)


def add_x_forwarded(headers: HTTPHeaders, forwarding: Forwarding, trusted: bool) -> None:
    """Add X-Forwarded-For, -Proto, -Host, -Port and -Prefix to the upstream request.

    A ``trusted`` sender's chain is continued in one X-Forwarded-For line, and what else it said is kept, because it
    stands nearer to the client. From anyone else all five are replaced, or removed where we have nothing to say.
    """
    client = forwarding.client
    if trusted:
        client = ", ".join([*(line for line in headers.get_list("X-Forwarded-For") if line), client])
    elif not _X_FORWARDED.isdisjoint(lines_of(headers)):
        for name in _X_FORWARDED & lines_of(headers).keys():
            del headers[name]
    put(headers, "X-Forwarded-For", client)
    put_missing(headers, forwarding.asked)


def add_forwarded(headers: HTTPHeaders, forwarding: Forwarding, trusted: bool) -> None:
    """Add our element to Forwarded (RFC 7239 section 4): behind those of a ``trusted`` sender, else alone."""
    element = f"for={_node(forwarding.client)};proto={_quoted(forwarding.scheme)}"
    if forwarding.host:
        element += f";host={_quoted(forwarding.host)}"
    if trusted:
        element = ", ".join([*(line for line in headers.get_list("Forwarded") if line), element])
    put(headers, "Forwarded", element)


def add_via(headers: HTTPHeaders, version: str, pseudonym: str) -> None:
    """Append our member to Via (RFC 9110 section 7.6.3).

    ``version`` is that of the message received, such as ``"HTTP/1.1"``; the protocol's name may be left out.
    """
    member = _via_member(version, pseudonym)
    if "Via" in lines_of(headers):
        # One line (RFC 9110 section 5.3).
        member = ", ".join([*(line for line in headers.get_list("Via") if line), member])
    put(headers, "Via", member)


def via_count(headers: HTTPHeaders, pseudonym: str) -> int:
    """Return how many members of Via name ``pseudonym`` as the one who received: how often it came through us.

    Comments are no part of it. An open parenthesis that is never closed opens none, or a client could hide in it the
    members that we add behind.
    """
    lines = lines_of(headers).get("Via")
    if not lines:
        return 0
    value, wanted = ",".join(lines).lower(), pseudonym.lower()
    if wanted not in value:
        return 0
    members = (member.split() for member in _without_comments(value).split(","))
    return sum(1 for member in members if len(member) > 1 and member[1] == wanted)


def max_forwards(method: str, headers: HTTPHeaders) -> int | None:
    """Return how often the request may still be forwarded, ``None`` where there is no limit.

    RFC 9110 section 7.6.2: the field counts for OPTIONS and TRACE only. What is no number is ignored.
    """
    if method not in ("OPTIONS", "TRACE"):
        return None
    value = headers.get("Max-Forwards", "")
    # Ten digits are more than any chain is long.
    return int(value[:10]) if value.isascii() and value.isdigit() else None


@lru_cache(maxsize=64)
def _via_member(version: str, pseudonym: str) -> str:
    return f"{version.removeprefix('HTTP/')} {pseudonym}"


def _node(client: str) -> str:
    """Return a node of RFC 7239 section 6: IPv6 in brackets and quotes, without a zone, which is local to us."""
    if ":" in client and client[0] != "[":
        client = f"[{client.partition('%')[0]}]"
    return _quoted(client)


def _quoted(value: str) -> str:
    """Return ``value`` as it is when it is a token, else as a quoted-string (RFC 9110 section 5.6.4)."""
    if TOKEN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _without_comments(value: str) -> str:
    """Return ``value`` without its balanced comments (RFC 9110 section 5.6.5), in linear time."""
    if "(" not in value:
        return value
    kept: list[str] = []
    # Where in ``kept`` each comment that is open began.
    opened: list[int] = []
    for part in _COMMENT_PARTS.findall(value):
        if part == ")" and opened:
            del kept[opened.pop() :]
            continue
        if part == "(":
            opened.append(len(kept))
        kept.append(part)
    return "".join(kept)
