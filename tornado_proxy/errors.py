"""What can go wrong in an exchange; each class knows whose fault it is and what may be done about it.

::

    ProxyError                     status  fault       may be retried
     x NoUpstreamAvailable         503     upstream    no
     x UpstreamError               502     upstream    no
       + ConnectError              502     upstream    yes: no byte of the request left
         - ConnectTimeout          504     upstream    yes, unless the same address would be tried again
       + UpstreamTimeout           504     upstream    no
       + UpstreamClosed            502     upstream    safe methods whose body was not taken only
       + InvalidResponse           502     upstream    no
     x BadRequest                  400     downstream  no (some with 403, 431 or 501; see `refusal`)
       + BodyTooLarge              413     downstream  no
       + DownstreamTimeout         408     downstream  no
     x DownstreamClosed            499     downstream  never sent; logged; not counted against the upstream
     x HookError                   500     proxy       no: a hook raised, or asked for what cannot be done
     x LoopDetected                508     proxy       no
     x TunnelClosed                503     proxy       no: idle for too long, or the process is about to end

Nothing here touches a socket, a handler or an option.
"""

from __future__ import annotations

from enum import StrEnum


class Side(StrEnum):
    """Who caused it."""

    DOWNSTREAM = "downstream"
    UPSTREAM = "upstream"
    PROXY = "proxy"


class Phase(StrEnum):
    """How far the exchange had come."""

    RESOLVE = "resolve"
    CONNECT = "connect"
    TLS = "tls"
    SEND = "send"
    HEAD = "head"
    BODY = "body"
    UPGRADE = "upgrade"


class Retry(StrEnum):
    """When another attempt cannot make the upstream act twice (RFC 9110 section 9.2.2)."""

    NEVER = "never"
    # Nothing of the request was sent.
    ALWAYS = "always"
    # Something may have been: the forwarder repeats safe methods only, which is stricter than idempotent.
    IF_IDEMPOTENT = "if-idempotent"


class ProxyError(Exception):
    """An exchange that did not go well.

    ``status_code`` is the answer that the downstream gets while nothing has been sent; ``upstream`` is the
    ``scheme://host:port`` that was tried, or ``None``; ``__cause__`` is the exception of the client library
    where there is one. The message is for logs and hooks; it never reaches the downstream.
    """

    status_code = 502
    side = Side.PROXY
    retry = Retry.NEVER

    def __init__(self, message: str, *, phase: Phase | None = None, upstream: str | None = None) -> None:
        super().__init__(message)
        self.phase = phase
        self.upstream = upstream


class NoUpstreamAvailable(ProxyError):
    """No upstream can take the request now; the answer carries ``Retry-After`` (RFC 9110 section 15.6.4)."""

    status_code = 503
    side = Side.UPSTREAM


class UpstreamError(ProxyError):
    """The upstream, or the way to it, failed."""

    side = Side.UPSTREAM


class ConnectError(UpstreamError):
    """No connection could be made, so no byte of the request has left."""

    retry = Retry.ALWAYS


class ConnectTimeout(ConnectError):
    """No connection within ``connect_timeout``."""

    status_code = 504


class UpstreamTimeout(UpstreamError):
    """The upstream was silent for ``response_timeout`` or ``idle_timeout``, or ``total_timeout`` passed."""

    status_code = 504


class UpstreamClosed(UpstreamError):
    """The upstream closed or reset the connection before its response was complete."""

    retry = Retry.IF_IDEMPOTENT


class InvalidResponse(UpstreamError):
    """What the upstream sent is not a valid HTTP response, or is larger than we agreed to hold."""


class BadRequest(ProxyError):
    """The downstream's request cannot be forwarded safely."""

    status_code = 400
    side = Side.DOWNSTREAM


def refusal(status_code: int, message: str, *, phase: Phase | None = None) -> BadRequest:
    """Return a ``BadRequest`` with a status of its own, to be raised at once.

    Not by a name in the function that raises it: error and frame would hold each other, and with them all that was read
    of the request, until the garbage collector comes.
    """
    error = BadRequest(message, phase=phase)
    error.status_code = status_code
    return error


class BodyTooLarge(BadRequest):
    """The inbound body is larger than ``max_body_size``."""

    status_code = 413


class DownstreamTimeout(BadRequest):
    """The downstream stopped sending its body, or stopped reading the response."""

    status_code = 408


class DownstreamClosed(ProxyError):
    """The downstream left before it had the whole response. Nothing can be sent; 499 is for the log."""

    status_code = 499
    side = Side.DOWNSTREAM


class HookError(ProxyError):
    """A hook raised (``__cause__`` is what it raised), took too long, or asked for what cannot be done or sent."""

    status_code = 500


class TunnelClosed(ProxyError):
    """We ended a tunnel, or would not begin one any more. Nobody's fault."""

    status_code = 503


class LoopDetected(ProxyError):
    """The request has come through this proxy several times (RFC 5842 section 7.2)."""

    status_code = 508
