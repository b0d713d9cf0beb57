"""Header rules of a gateway: which fields pass (RFC 9110 section 7.6).

Pure functions: nothing here touches a socket, a handler or an option. Names are compared in the form in which
``HTTPHeaders`` keeps its keys (``Te``, ``X-Real-Ip``), so no name is lower-cased on the way, and a head is looked at
through :func:`lines_of`.

What we add stands in `forwarding`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
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


def put(headers: HTTPHeaders, name: str, value: str) -> None:
    """Set a field, by its name in the spelling of ``HTTPHeaders``."""
    headers._as_list[name] = [value]
    headers._combined_cache[name] = value


def put_missing(headers: HTTPHeaders, fields: Iterable[tuple[str, str]]) -> None:
    """Set those of ``fields`` that are not there, by names in the spelling of ``HTTPHeaders``."""
    lines = headers._as_list
    for name, value in fields:
        if name not in lines:
            lines[name] = [value]


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
