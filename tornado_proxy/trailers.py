"""Trailers: the fields behind a body (RFC 9110 section 6.5), and which of them pass. Pure functions."""

from __future__ import annotations

from tornado.httputil import HTTPHeaders

from tornado_proxy.headers import NOT_IN_TRAILERS, parse_fields, remove_hop_by_hop

# Lines of a section, and bytes of all of them.
MAX_LINES = 100
_MAX_BYTES = 64 * 1024


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
