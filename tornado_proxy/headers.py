"""Header rules of a gateway: which fields pass, and which we add (RFC 9110 section 7.6, RFC 7239).

Pure functions: nothing here touches a socket, a handler or an option. Names are compared in the form in which
``HTTPHeaders`` keeps its keys (``Te``, ``X-Real-Ip``), so no name is lower-cased on the way, and a head is looked at
through :func:`lines_of`.

Cleaning comes first, own fields second: a client's ``Connection: X-Forwarded-For`` must not remove what we add.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

from tornado.httputil import HTTPHeaders

# RFC 9110 section 5.6.2.
TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")

# RFC 9110 section 7.6.1, and the Proxy-* fields (section 11.7), which are for us and not for the upstream.
HOP_BY_HOP = frozenset(
    {
        "Connection",
        "Keep-Alive",
        "Proxy-Authenticate",
        "Proxy-Authorization",
        "Proxy-Connection",
        "Te",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
    }
)

# RFC 9110 section 6.5.1: nobody may find out only behind a body how it was framed, for whom it was, what it is, or that
# somebody is logged in. Hop-by-hop fields, Transfer-Encoding and Trailer among them, are none of it either.
NOT_IN_TRAILERS = frozenset(
    {
        "Authorization",
        "Content-Encoding",
        "Content-Length",
        "Content-Range",
        "Content-Type",
        "Cookie",
        "Host",
        "Set-Cookie",
        "Www-Authenticate",
    }
)

# Host, the length and the expectation of the upstream request are ours (RFC 9110 sections 7.2, 8.6, 10.1.1). A CGI
# upstream would take Proxy for the variable HTTP_PROXY (CVE-2016-5385, "httpoxy").
_NOT_FORWARDED = frozenset({"Host", "Content-Length", "Expect", "Proxy"})

# What upstreams read to learn who the client is. All of X-Forwarded-* belongs to it; see is_forwarding_field.
_FORWARDING = frozenset(
    {
        "Forwarded",
        "Front-End-Https",
        "True-Client-Ip",
        "X-Client-Ip",
        "X-Cluster-Client-Ip",
        "X-Forwarded",
        "X-Original-Host",
        "X-Original-Url",
        "X-Real-Ip",
        "X-Rewrite-Url",
        "X-Scheme",
    }
)

# What we say ourselves.
_X_FORWARDED = frozenset(
    {"X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port", "X-Forwarded-Prefix"}
)

# Fields for all recipients. RFC 9110 section 7.6.1 forbids to nominate them, and honouring it would let a client strip
# what the proxy in front of us has added. Content-* and the forwarding family belong here too; see _may_be_nominated.
_END_TO_END = frozenset(
    {
        "Age",
        "Authorization",
        "Cache-Control",
        "Cookie",
        "Date",
        "Etag",
        "Expect",
        "Expires",
        "Host",
        "Last-Modified",
        "Location",
        "Max-Forwards",
        "Origin",
        "Pragma",
        "Range",
        "Set-Cookie",
        "Strict-Transport-Security",
        "Transfer-Encoding",
        "Vary",
        "Via",
        "Www-Authenticate",
    }
)

_NOTHING: frozenset[str] = frozenset()

# Characters of a Connection, and so names in it, beyond which it is not remembered: clients choose them, and a few
# heads of 64 KB in a cache would hold hundreds of megabytes.
_REMEMBERED = 256

# How many names are remembered as they came, and how long ones. Others choose them, so there must be an end.
_MOST_NAMES = 1000
_LONGEST_NAME = 64

# These describe the exact bytes of a body (RFC 9530, RFC 3230, RFC 2616 section 14.15).
_DIGESTS = ("Content-Md5", "Digest", "Content-Digest", "Repr-Digest")

_COMMENT_PARTS = re.compile(r"\\.?|[()]|[^()\\]+", re.DOTALL)
_NEITHER_LETTER_NOR_HYPHEN = re.compile(r"[^0-9A-Za-z-]")


def spelled(name: str) -> str:
    """Return ``name`` as ``HTTPHeaders`` spells it."""
    return "-".join([word.capitalize() for word in name.split("-")])


Found = TypeVar("Found")


class ByName(dict[str, Found]):
    """What ``find`` returns for a name. The first names are remembered, unless they are long."""

    def __init__(self, find: Callable[[str], Found]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, name: str) -> Found:
        found = self._find(name)
        if len(self) < _MOST_NAMES and len(name) <= _LONGEST_NAME:
            self[name] = found
        return found


# From whom a field goes upstream.
_FROM_ANYONE, _FROM_TRUSTED, _FROM_NOBODY = range(3)


def _from_whom(name: str) -> int:
    plain = _read_by_cgi(name)
    if plain != name and (plain in HOP_BY_HOP or plain in _NOT_FORWARDED):
        # Such as Transfer_Encoding, which would be taken for the framing.
        return _FROM_NOBODY
    return _FROM_TRUSTED if is_forwarding_field(plain) else _FROM_ANYONE


_passing = ByName(_from_whom)


def lines_of(headers: HTTPHeaders) -> dict[str, list[str]]:
    """Return what ``headers`` keep: the lines of each field, by its name in their spelling. For looking, not changing.

    A look into it takes a tenth of what ``HTTPHeaders`` takes, which first finds out how it would spell the name; a
    head is asked some twenty times on its way. The name is private to Tornado 6.6, and used here only.
    """
    return headers._as_list


def made_of(lines: dict[str, list[str]]) -> HTTPHeaders:
    """Return headers of these lines, by name in the spelling of ``HTTPHeaders``; they are known to be sound.

    Past the constructor, and past ``add()``, which looks at each name and value again: 3 us instead of 13 us for a
    browser's 12 fields. What is filled in is all that the class of Tornado 6.6 holds; a test compares the two ways.
    """
    headers = HTTPHeaders.__new__(HTTPHeaders)
    headers._as_list = lines
    headers._combined_cache = {}
    return headers


def nominated(headers: HTTPHeaders) -> frozenset[str]:
    """Return the names that the Connection lines nominate, in the case of ``HTTPHeaders`` keys.

    RFC 9110 section 7.6.1. Fields that are for all recipients cannot be nominated and are left out. Options that are
    no fields (``Close``) are in the result; no field of that name may exist (section 9.6).
    """
    lines = headers._as_list.get("Connection")
    if not lines:
        return _NOTHING
    value = lines[0] if len(lines) == 1 else ",".join(lines)
    return _nominated_by(value) if len(value) <= _REMEMBERED else _names_in(value)


def remove_hop_by_hop(headers: HTTPHeaders, drop: frozenset[str] = _NOTHING) -> None:
    """Remove hop-by-hop fields, nominated fields, and those in ``drop``.

    ``drop`` holds names in the case of ``HTTPHeaders`` keys and should be a constant.
    """
    unwanted = _unwanted(headers, drop)
    fields = headers._as_list
    for name in [name for name in fields if name in unwanted]:
        del fields[name]
        headers._combined_cache.pop(name, None)


def request_headers(inbound: HTTPHeaders, *, trusted: bool) -> HTTPHeaders:
    """Return the fields of an inbound request that go upstream, in a new ``HTTPHeaders``.

    Host, Content-Length and Expect are left to the caller. Unless the request came from a ``trusted`` proxy, every
    field that names a client, scheme or path is dropped, because anyone can write it.
    """
    unwanted = _unwanted(inbound, _NOT_FORWARDED)
    limit = _FROM_TRUSTED if trusted else _FROM_ANYONE
    return made_of(
        {
            name: lines.copy()
            for name, lines in inbound._as_list.items()
            if name not in unwanted and _passing[name] <= limit
        }
    )


def is_forwarding_field(name: str) -> bool:
    """True when ``name`` says who the client is or what it asked for: Forwarded, X-Forwarded-*, X-Real-IP and so on.

    ``X_Real_IP`` counts as well: CGI and WSGI upstreams cannot tell it from ``X-Real-IP``, and some not ``X.Real.IP``.
    """
    name = _read_by_cgi(name)
    return name in _FORWARDING or name.startswith("X-Forwarded-")


def body_changed(headers: HTTPHeaders, length: int | None) -> None:
    """Make ``headers`` true again after the body was changed.

    ``length`` is the new Content-Length, ``None`` when it is not known. Digests are removed. A strong ETag becomes
    weak (RFC 9110 section 8.8.1): the content still means the same, but byte ranges of it cannot be mixed. So
    Accept-Ranges goes too.
    """
    if length is not None:
        headers["Content-Length"] = str(length)
    elif "Content-Length" in headers:
        del headers["Content-Length"]
    for name in (*_DIGESTS, "Accept-Ranges"):
        if name in headers:
            del headers[name]
    etag = headers.get("Etag")
    if etag is not None and etag.startswith('"'):
        headers["Etag"] = "W/" + etag


def remove_range(headers: HTTPHeaders) -> None:
    """Ask for the whole in place of a part (RFC 9110 section 14.2 lets any recipient ignore Range)."""
    for name in ("Range", "If-Range"):
        if name in headers:
            del headers[name]


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
    client, fields = forwarding.client, headers._as_list
    if trusted:
        client = ", ".join([*(line for line in headers.get_list("X-Forwarded-For") if line), client])
    elif not _X_FORWARDED.isdisjoint(fields):
        for name in _X_FORWARDED & fields.keys():
            del headers[name]
    _put(headers, "X-Forwarded-For", client)
    for name, value in forwarding.asked:
        if name not in fields:
            fields[name] = [value]


def add_forwarded(headers: HTTPHeaders, forwarding: Forwarding, trusted: bool) -> None:
    """Add our element to Forwarded (RFC 7239 section 4): behind those of a ``trusted`` sender, else alone."""
    element = f"for={_node(forwarding.client)};proto={_quoted(forwarding.scheme)}"
    if forwarding.host:
        element += f";host={_quoted(forwarding.host)}"
    if trusted:
        element = ", ".join([*(line for line in headers.get_list("Forwarded") if line), element])
    _put(headers, "Forwarded", element)


def add_via(headers: HTTPHeaders, version: str, pseudonym: str) -> None:
    """Append our member to Via (RFC 9110 section 7.6.3).

    ``version`` is that of the message received, such as ``"HTTP/1.1"``; the protocol's name may be left out.
    """
    member = _via_member(version, pseudonym)
    if "Via" in headers._as_list:
        # One line (RFC 9110 section 5.3).
        member = ", ".join([*(line for line in headers.get_list("Via") if line), member])
    _put(headers, "Via", member)


def via_count(headers: HTTPHeaders, pseudonym: str) -> int:
    """Return how many members of Via name ``pseudonym`` as the one who received: how often it came through us.

    Comments are no part of it. An open parenthesis that is never closed opens none, or a client could hide in it the
    members that we add behind.
    """
    lines = headers._as_list.get("Via")
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


@lru_cache(maxsize=64)
def _nominated_by(value: str) -> frozenset[str]:
    return _names_in(value)


def _names_in(value: str) -> frozenset[str]:
    names = {spelled(name.strip(" \t")) for name in value.split(",")}
    return frozenset(name for name in names if name and _may_be_nominated(name))


def _may_be_nominated(name: str) -> bool:
    return not (name in _END_TO_END or name.startswith("Content-") or is_forwarding_field(name))


def _unwanted(headers: HTTPHeaders, drop: frozenset[str]) -> frozenset[str]:
    named = nominated(headers) if "Connection" in headers._as_list else _NOTHING
    return _union(named, drop) if len(named) <= _REMEMBERED else HOP_BY_HOP | named | drop


@lru_cache(maxsize=128)
def _union(named: frozenset[str], drop: frozenset[str]) -> frozenset[str]:
    return HOP_BY_HOP | named | drop


def _read_by_cgi(name: str) -> str:
    """Return the name that CGI and WSGI upstreams cannot tell from ``name``.

    In their variables a hyphen becomes an underscore (RFC 3875 section 4.1.18), and in some servers so does every other
    character that is neither letter nor digit.
    """
    return spelled(_NEITHER_LETTER_NOR_HYPHEN.sub("-", name))


def _put(headers: HTTPHeaders, name: str, value: str) -> None:
    """Set a field, by its name in the spelling of ``HTTPHeaders``."""
    headers._as_list[name] = [value]
    headers._combined_cache[name] = value


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
