"""Has this message a body, and how long is it? Our own verdict, from RFC 9112 section 6.

Tornado looks at the framing only after ``prepare()``, when a proxy has already sent the head upstream. So we judge
it first, and the framing upstream is built from the verdict, never by copying fields: whatever two parsers could
read in two ways is refused here. The checks on what a hook wrote (``is_token``, ``header_value_ok``) live here
too, because they keep a message from becoming two. Pure functions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tornado.httputil import HTTPHeaders

from tornado_proxy.errors import BadRequest, InvalidResponse, refusal
from tornado_proxy.headers import TOKEN, lines_of

# 10**18 - 1 fits a signed 64 bit integer, which is what libcurl and most upstreams count in.
_MAX_LENGTH_DIGITS = 18

# RFC 9110 section 5.5: field-content is HTAB, SP, VCHAR and obs-text. All else could end the line or the string.
_FORBIDDEN_IN_LINE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")


@dataclass(frozen=True, slots=True)
class Framing:
    """How the body of a message is delimited.

    ``length`` is the declared number of bytes, ``None`` when none was declared; ``chunked`` excludes a length.
    """

    length: int | None
    chunked: bool

    @property
    def has_body(self) -> bool:
        """True when at least one byte, or a chunk, will follow the head."""
        return self.chunked or bool(self.length)


NO_BODY = Framing(length=None, chunked=False)
CHUNKED = Framing(length=None, chunked=True)


def request_framing(version: str, headers: HTTPHeaders) -> Framing:
    """Return how the body of a request is delimited, after RFC 9112 section 6.3.

    ``version`` is the start line's, such as ``"HTTP/1.1"``. ``Content-Length: 0`` is ``Framing(0, False)``, which
    is not ``NO_BODY``: the upstream shall see the field too. Raises ``BadRequest`` for everything ambiguous, with
    ``status_code`` 501 where the only fault is a transfer coding that we do not know; the connection must then
    be closed, because nobody knows where the next request starts.
    """
    fields = lines_of(headers)
    codings = fields.get("Transfer-Encoding")
    lengths = fields.get("Content-Length")

    # Steps 1 and 2 of section 6.3 are about responses. Neither field: a request without a body (step 7).
    if not codings and not lengths:
        return NO_BODY

    if codings:
        # Step 3: both fields. Section 6.1 lets us drop the length; an honest client never sends both.
        if lengths:
            raise BadRequest("request has both Transfer-Encoding and Content-Length")
        # Section 6.1: Transfer-Encoding in HTTP/1.0 is faulty framing even if it would parse.
        if version != "HTTP/1.1":
            raise BadRequest(f"request has Transfer-Encoding in {version}")
        # Step 4: chunked and nothing else.
        _require_chunked(codings)
        return CHUNKED

    # Steps 5 and 6: one length, however often it is repeated.
    assert lengths is not None
    length = _parse_length(lengths)
    if length is None:
        raise BadRequest("request has an invalid Content-Length")
    return Framing(length=length, chunked=False)


def expects_continue(version: str, headers: HTTPHeaders, framing: Framing) -> bool:
    """True when the client waits for 100 (Continue) before it sends the body.

    RFC 9110 section 10.1.1: an expectation in HTTP/1.0 is ignored, and one without a body means nothing. Other
    expectations are not ours to meet, and not forwarded.
    """
    if "Expect" not in lines_of(headers) or version == "HTTP/1.0" or not framing.has_body:
        return False
    return "100-continue" in [member.strip(" \t").lower() for member in headers["Expect"].split(",")]


def response_may_have_body(method: str, status: int) -> bool:
    """False when a response to ``method`` with ``status`` has no content whatever its fields say.

    RFC 9110 section 6.4.1: answers to HEAD, 1xx, 204, 304, and 2xx to CONNECT.
    """
    if method == "HEAD" or status in (204, 304) or 100 <= status < 200:
        return False
    return not (method == "CONNECT" and 200 <= status < 300)


def response_length(headers: HTTPHeaders) -> int | None:
    """Return the length that the upstream declared for its body, ``None`` when it declared none.

    Transfer-Encoding overrides Content-Length (RFC 9112 section 6.3 step 3). An invalid or contradictory length
    raises ``InvalidResponse`` (step 5), and so does a transfer coding other than one ``chunked``, because nobody knows
    how much of it the client undid; the upstream connection must then not be used again.
    """
    fields = lines_of(headers)
    lengths = fields.get("Content-Length")
    if "Transfer-Encoding" in fields:
        if [value.strip(" \t").lower() for value in fields["Transfer-Encoding"]] != ["chunked"]:
            raise InvalidResponse("upstream sent a Transfer-Encoding other than chunked")
        return None
    if not lengths:
        return None
    length = _parse_length(lengths)
    if length is None:
        raise InvalidResponse("upstream sent an invalid Content-Length")
    return length


def is_token(name: str) -> bool:
    """True for a token of RFC 9110 section 5.6.2, which is what a method and a field name must be."""
    return TOKEN.fullmatch(name) is not None


def header_value_ok(value: str) -> bool:
    """True when ``value`` can be sent as a field value: no CR, LF, NUL or other control character but HTAB.

    Characters above U+00FF are refused, because a header is sent as latin1. RFC 9110 section 5.5; a reason phrase may
    have the same characters (RFC 9112 section 4).
    """
    # Nearly every value is printable ASCII, and these two run in C without a match object.
    if value.isascii() and value.isprintable():
        return True
    return _FORBIDDEN_IN_LINE.search(value) is None


def _require_chunked(lines: list[str]) -> None:
    """Return only for exactly one ``chunked``. Section 6.1 asks for 501 where the coding is one we do not know."""
    # U+212A, the Kelvin sign, is a "k" to lower(); hence the look at isascii().
    if len(lines) == 1 and lines[0].isascii():
        # Only SP and HTAB: str.strip() would also eat \x0b and \x85, which other parsers keep ("\x0bchunked").
        codings = [coding.strip(" \t").lower() for coding in lines[0].split(",")]
        if codings == ["chunked"]:
            return
        if "chunked" not in codings[:-1] and all(map(is_token, codings)):
            raise refusal(501, "request has a transfer coding other than chunked")
    raise BadRequest("request has a malformed Transfer-Encoding")


def _parse_length(lines: list[str]) -> int | None:
    """Return the one length in all Content-Length lines, ``None`` when they are invalid or disagree.

    Section 6.3 step 5 lets identical values, in one line or in several, stand for one.
    """
    digits = lines[0]
    if len(lines) > 1 or "," in digits:
        values = {value.strip(" \t") for value in ",".join(lines).split(",")}
        if len(values) != 1:
            return None
        digits = values.pop()
    # int() takes "+5", "5_0" and other scripts' digits; isdigit() alone takes the last.
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MAX_LENGTH_DIGITS):
        return None
    return int(digits)
