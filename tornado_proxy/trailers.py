"""Trailers: the fields behind a body (RFC 9110 section 6.5), and which of them pass. Pure functions."""

from __future__ import annotations

import re

from tornado.httputil import HTTPHeaders

from tornado_proxy.fieldlines import parse_fields
from tornado_proxy.headers import (
    HOP_BY_HOP,
    NOT_IN_TRAILERS,
    TOKEN,
    is_forwarding_field,
    remove_hop_by_hop,
    spelled,
)

# Lines of a section, and bytes of all of them.
MAX_LINES = 100
_MAX_BYTES = 64 * 1024

# RFC 9110 section 6.5.1: what an upstream has to know before the body, so that no sender has a reason to say it behind
# one. Some join the trailers with the head, and would act on it: routing, controls, conditionals (If-*), negotiation
# (Accept*), authentication, response control, what WebDAV and others make of these, and what proxies say to each other.
_NOT_IN_A_REQUEST = (
    HOP_BY_HOP
    | NOT_IN_TRAILERS
    | {
        "Age",
        "Cache-Control",
        "Cdn-Loop",
        "Date",
        "Depth",
        "Destination",
        "Early-Data",
        "Expect",
        "Expires",
        "Http2-Settings",
        "If",
        "Lock-Token",
        "Location",
        "Max-Forwards",
        "Origin",
        "Overwrite",
        "Pragma",
        "Prefer",
        "Priority",
        "Range",
        "Referer",
        "Retry-After",
        "Vary",
        "Via",
        "Warning",
        "X-Http-Method",
        "X-Http-Method-Override",
        "X-Method-Override",
    }
)
_NOT_IN_A_REQUEST_FAMILIES = ("Accept", "Access-Control-", "Content-", "If-", "Proxy", "Sec-")
# The one of the Content-* family that is made for it (RFC 9530 section 2).
_MADE_FOR_IT = "Content-Digest"

# CGI turns a hyphen into an underscore, and some of its implementations anything else too, so that names which differ
# in these only are one name to the application.
_LOOKS_ALIKE = re.compile(r"[^0-9A-Za-z]")


def trailer_fields(lines: list[bytes]) -> HTTPHeaders:
    """Return what may be passed on of a trailer section that a client received, each line with its end.

    Empty where a line is malformed or the section is too large: a recipient may drop the whole of it, while a part of
    it could mean something else.
    """
    if len(lines) > MAX_LINES or sum(map(len, lines)) > _MAX_BYTES:
        return HTTPHeaders()
    try:
        fields = parse_fields([line for line in lines if line not in (b"\r\n", b"\n")])
    except ValueError:
        return HTTPHeaders()
    remove_hop_by_hop(fields, NOT_IN_TRAILERS)
    return fields


def upstream_trailers(
    trailers: HTTPHeaders, inbound: HTTPHeaders, sent: HTTPHeaders, listed: frozenset[str] | None = None
) -> HTTPHeaders:
    """Return what goes upstream of the fields behind a request's body: never what its head could not have said.

    ``inbound`` is the head as it came, ``sent`` the one that goes upstream. No field of either may come again: it would
    change what we have decided, or bring back what was removed. ``listed``, where given, are the only ones that pass.
    """
    taken = _names_taken(inbound, trailers)
    taken.update(map(_plain, sent))
    passed = HTTPHeaders()
    for name, value in trailers.get_all():
        if _may_pass(name, taken) and (listed is None or name in listed):
            passed.add(name, value)
    return passed


def announced(inbound: HTTPHeaders) -> str:
    """Return the Trailer field (RFC 9110 section 6.6.2) to send for that of ``inbound``: without what will not pass."""
    taken = _names_taken(inbound)
    return ", ".join([name for name in names_listed(inbound) if _may_pass(name, taken)])


def names_listed(head: HTTPHeaders) -> dict[str, None]:
    """Return the names in the Trailer field of ``head``, in their order and in the spelling of ``HTTPHeaders``.

    As many as a section may have lines: 64 KB of them would take longer than all the rest of a head.
    """
    names = ",".join(head.get_list("Trailer")).split(",", MAX_LINES)[:MAX_LINES]
    return {spelled(name): None for name in (name.strip(" \t") for name in names) if TOKEN.fullmatch(name)}


def field_lines(fields: HTTPHeaders | None) -> list[bytes]:
    """Return the lines to write for ``fields``, without their ends; none for ``None``."""
    return [] if fields is None else [f"{name}: {value}".encode("latin-1") for name, value in fields.get_all()]


def _names_taken(*sections: HTTPHeaders) -> set[str]:
    """Return the names of the first section, and all that a Connection of any nominates, whether it may or not."""
    taken = set(map(_plain, sections[0]))
    for section in sections:
        # Each once: 64 KB of commas would take 20 ms.
        for name in set(",".join(section.get_list("Connection")).split(",")):
            taken.add(_plain(name.strip(" \t")))
    return taken


def _may_pass(name: str, taken: set[str]) -> bool:
    plain = _plain(name)
    if plain in taken or plain in _NOT_IN_A_REQUEST or is_forwarding_field(plain):
        return False
    return name == _MADE_FOR_IT or not plain.startswith(_NOT_IN_A_REQUEST_FAMILIES)


def _plain(name: str) -> str:
    """Return the name that ``name`` may be taken for, in the spelling of ``HTTPHeaders``."""
    return spelled(_LOOKS_ALIKE.sub("-", name))
