"""Fields of a head: written down as pairs, and compared as pairs."""

from __future__ import annotations

from tornado.httputil import HTTPHeaders


def headers_of(*fields: tuple[str, str]) -> HTTPHeaders:
    headers = HTTPHeaders()
    for name, value in fields:
        headers.add(name, value)
    return headers


def pairs(headers: HTTPHeaders) -> list[tuple[str, str]]:
    """Return each line of each field."""
    return list(headers.get_all())
