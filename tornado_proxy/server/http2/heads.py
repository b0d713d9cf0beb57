"""Fields of HTTP/2 -> our verdict on a request, and back: RFC 9113 section 8 as pure functions.

This is a security boundary, as `server.parser` is. What goes upstream is HTTP/1.1, so whatever could become another
message there is refused here: it never gets as far as an application.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from hpack import HeaderTuple, NeverIndexedHeaderTuple
from tornado.escape import native_str
from tornado.httputil import HTTPHeaders

from tornado_proxy.errors import BadRequest, refusal
from tornado_proxy.framing import CHUNKED, NO_BODY, Framing, header_value_ok, is_token, request_framing
from tornado_proxy.headers import HOP_BY_HOP, NOT_IN_TRAILERS, made_of, nominated, put, spelled
from tornado_proxy.server.parser import MAX_TRAILERS, MAX_TRAILERS_SIZE, RequestHead, host_ok, too_many_trailers

VERSION = "HTTP/2.0"

Fields = list[tuple[bytes, bytes]]

# Section 8.2: lower case only. The colon of a pseudo-header field is not in here, and so no other is. The length is
# that of server.parser, for the same reason.
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]{1,1024}+")
_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++")
# Section 8.3.1: a path that is absolute. What else it may look like is for the application, as in HTTP/1.1.
_PATH = re.compile(rb"/[\x21-\x7e\x80-\xff]*+")
_SCHEME = re.compile(rb"[A-Za-z][A-Za-z0-9+\-.]*+")
# Not what RFC 9110 section 5.5 allows in a value.
_FORBIDDEN = re.compile(rb"[^\t\x20-\x7e\x80-\xff]")

_PSEUDO = frozenset({b":method", b":scheme", b":authority", b":path"})
# Section 8.2.2. In the spelling of HTTPHeaders; TE is looked at by itself.
_CONNECTION_SPECIFIC = frozenset({"Connection", "Keep-Alive", "Proxy-Connection", "Transfer-Encoding", "Upgrade"})
# Of RFC 7541 section 4.1.
_OVERHEAD = 32
# Values that will not come again, which would only push others out of the table; and a secret (RFC 7541 section 7.1.3).
_NOT_INDEXED = frozenset(
    {"Age", "Content-Length", "Content-Range", "Date", "Etag", "Expires", "Last-Modified", "Location", "Set-Cookie"}
)

# Names as they came -> as HTTPHeaders spells them, for those that passed; and back. Both bounded: clients choose them.
_known: dict[bytes, str] = {}
_lower: dict[str, bytes] = {}
_MAX_KNOWN = 1000
_MAX_LENGTH = 64


class Malformed(Exception):
    """Not a message of HTTP (section 8.1.1): an error of the stream."""


def request_head(fields: Fields, *, ended: bool, max_size: int) -> RequestHead:
    """Return the head of a request; ``ended`` says that it has no body.

    Raises :class:`Malformed`, and ``BadRequest`` with its status for what is to be answered: a head above ``max_size``
    octets (431), counted as in SETTINGS_MAX_HEADER_LIST_SIZE, and CONNECT (501).
    """
    size = sum([len(name) + len(value) for name, value in fields]) + _OVERHEAD * len(fields)
    if size > max_size:
        raise refusal(431, f"head of the request is larger than {max_size} bytes")
    pseudo: dict[bytes, bytes] = {}
    at = 0
    for name, value in fields:
        if name[:1] != b":":
            break
        if name not in _PSEUDO or name in pseudo:
            raise Malformed(f"pseudo-header field {name!r}, unknown or twice")
        pseudo[name] = value
        at += 1
    headers = _headers(fields[at:])
    method = pseudo.get(b":method", b"")
    if not _METHOD.fullmatch(method):
        raise Malformed("no method, or one that is not a token")
    if method == b"CONNECT":
        raise _refused_connect(pseudo)
    path = _path(method, pseudo)
    _set_host(headers, pseudo.get(b":authority"))
    framing = _framing(headers, ended=ended)
    expects = framing.has_body and "Expect" in headers and headers["Expect"].lower() == "100-continue"
    return RequestHead(method.decode(), path, VERSION, headers, framing, keep_alive=True, expects_continue=expects)


def request_trailers(fields: Fields) -> HTTPHeaders:
    """Return the trailers of a request. Raises :class:`Malformed` for what cannot be any (section 8.1).

    Raises ``BadRequest`` with its status where there are more than HTTP/1.1 may have.
    """
    size = sum([len(name) + len(value) for name, value in fields])
    if len(fields) > MAX_TRAILERS or size > MAX_TRAILERS_SIZE:
        raise too_many_trailers()
    return _headers(fields)


def response_fields(status: int, headers: HTTPHeaders) -> Fields:
    """Return the fields of a response: without what is HTTP/1.1's, and without what would not stay one field.

    Raises ``ValueError`` for a character that cannot be sent, as HTTP/1.1 does.
    """
    if not 100 <= status <= 999 or status == 101:
        raise ValueError(f"status {status} cannot be sent in HTTP/2")
    fields: Fields = [(b":status", b"%d" % status)]
    fields += _outgoing(headers, HOP_BY_HOP)
    return fields


def http2_trailers(headers: HTTPHeaders) -> Fields:
    """Return the fields of trailers, without those that cannot be any. Raises ``ValueError``."""
    return list(_outgoing(headers, HOP_BY_HOP | NOT_IN_TRAILERS))


def _headers(fields: Iterable[tuple[bytes, bytes]]) -> HTTPHeaders:
    """Build the headers of fields that are all sound."""
    values: dict[str, list[str]] = {}
    for raw, value in fields:
        name = _known.get(raw) or _checked(raw)
        if _FORBIDDEN.search(value) or value != value.strip(b" \t"):
            raise Malformed(f"value of {name} has a character that it cannot have")
        if name in values:
            values[name].append(value.decode("latin-1"))
        else:
            values[name] = [value.decode("latin-1")]
    if "Te" in values and [value.lower() for value in values["Te"]] != ["trailers"]:
        raise Malformed("TE other than trailers")
    if "Cookie" in values and len(values["Cookie"]) > 1:
        # Section 8.2.3: HTTP/1.1 and applications know one only.
        values["Cookie"] = ["; ".join(values["Cookie"])]
    return made_of(values)


def _checked(raw: bytes) -> str:
    """Return a name as HTTPHeaders spells it. What is connection-specific never becomes known."""
    if not _NAME.fullmatch(raw):
        raise Malformed(f"field name {raw[:80]!r}")
    name = spelled(raw.decode())
    if name in _CONNECTION_SPECIFIC:
        raise Malformed(f"{name}, which is HTTP/1.1's")
    if len(_known) < _MAX_KNOWN and len(raw) <= _MAX_LENGTH:
        _known[raw] = name
    return name


def _refused_connect(pseudo: dict[bytes, bytes]) -> Exception:
    """Section 8.5. Nobody here can use a tunnel: SETTINGS_ENABLE_CONNECT_PROTOCOL is 0, and a gateway is no proxy."""
    if b":scheme" in pseudo or b":path" in pseudo or not pseudo.get(b":authority"):
        return Malformed("CONNECT with more or less than its authority")
    return refusal(501, "CONNECT is not accepted")


def _path(method: bytes, pseudo: dict[bytes, bytes]) -> str:
    if not _SCHEME.fullmatch(pseudo.get(b":scheme", b"")):
        raise Malformed("no scheme, or none that can be")
    path = pseudo.get(b":path", b"")
    if not (_PATH.fullmatch(path) or (path == b"*" and method == b"OPTIONS")):
        raise Malformed("no path, or none that is absolute")
    return path.decode("latin-1")


def _set_host(headers: HTTPHeaders, authority: bytes | None) -> None:
    """Section 8.3.1: :authority is Host; both must agree, and one must be there."""
    hosts = headers.get_list("Host")
    if authority is not None:
        named = authority.decode("latin-1")
        if any(host.lower() != named.lower() for host in hosts):
            raise Malformed("Host is another than :authority")
        hosts = [named]
        put(headers, "Host", named)
    if len(hosts) != 1 or not hosts[0] or not host_ok(hosts[0]):
        raise Malformed("no authority, more than one, or none that can be")


def _framing(headers: HTTPHeaders, *, ended: bool) -> Framing:
    """How long the body is: as declared, else until the stream ends, which for an upstream means chunked."""
    if "Content-Length" not in headers:
        return NO_BODY if ended else CHUNKED
    try:
        framing = request_framing("HTTP/1.1", headers)
    except BadRequest as error:
        raise Malformed(str(error)) from None
    if ended and framing.length:
        raise Malformed("a Content-Length and no content")
    # RFC 9112 section 6.3 step 5 lets "5, 5" stand for 5; applications call int().
    headers["Content-Length"] = str(framing.length)
    return framing


def _outgoing(headers: HTTPHeaders, drop: frozenset[str]) -> Iterator[tuple[bytes, bytes]]:
    named_by_connection = nominated(headers)
    for name, value in headers.get_all():
        if name in drop or name in named_by_connection:
            continue
        lower = _lower.get(name) or _lowered(name)
        # Tornado lets bytes pass, and HTTP/1.1 has room for spaces around a value.
        text = native_str(value).strip(" \t")
        if not header_value_ok(text):
            raise ValueError(f"Illegal characters in the value of {name}")
        field = NeverIndexedHeaderTuple if name in _NOT_INDEXED else HeaderTuple
        yield field(lower, text.encode("latin-1"))


def _lowered(name: str) -> bytes:
    name = native_str(name)
    if not is_token(name):
        raise ValueError(f"Illegal characters in the field name {name!r}")
    lower = name.lower().encode()
    if len(_lower) < _MAX_KNOWN and len(name) <= _MAX_LENGTH:
        _lower[name] = lower
    return lower
