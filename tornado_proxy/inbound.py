"""Step (1) of an exchange: our own verdict on the request, before anything is sent upstream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tornado.httputil import HTTPServerRequest

from tornado_proxy.connections import ServerConnection
from tornado_proxy.errors import refusal
from tornado_proxy.forwarding import max_forwards
from tornado_proxy.framing import Framing, expects_continue, request_framing
from tornado_proxy.handshake import wants_upgrade
from tornado_proxy.headers import lines_of
from tornado_proxy.options import ProxyOptions
from tornado_proxy.urls import RequestTarget, parse_target, tail_below

# Given the inbound target: the prefix that stays here, None where that is not known, and the raw tail that goes on.
Split = Callable[[RequestTarget], tuple[str | None, str]]


@dataclass(slots=True)
class Inbound:
    """What we decided about the inbound request."""

    target: RequestTarget
    framing: Framing
    # What the mount left of the path, raw; the mount's prefix, None where it is not known.
    tail: str
    prefix: str | None
    # The body, where it was read before the handler was asked; else it comes through Exchange.receive.
    body: bytes | None = None
    # The downstream waits for 100 (Continue) before it sends its body.
    expects_continue: bool = False
    # Whether it is a websocket handshake.
    upgrade: bool = False
    # How often an OPTIONS or TRACE may still be forwarded; None is no limit.
    max_forwards: int | None = None


class Mounted:
    """What a rule of ``mount()`` knows: the checked options, and a literal prefix without a slash at its end."""

    __slots__ = ("options", "prefix")

    def __init__(self, options: ProxyOptions, prefix: str) -> None:
        self.options = options
        self.prefix = prefix

    def split(self, target: RequestTarget) -> tuple[str, str]:
        """Return the prefix and the raw tail below it."""
        tail = tail_below(self.prefix, target.path)
        return self.prefix, target.path if tail is None else tail


def judge(request: HTTPServerRequest, connection: ServerConnection, options: ProxyOptions, split: Split) -> Inbound:
    """Return the verdict on a request whose body is still to come. Raises ``BadRequest`` for what is ambiguous."""
    framing = connection.framing or request_framing(request.version, request.headers)
    method = request.method
    if method not in options.methods:
        raise refusal(501, f"method {method} is not forwarded; custom_http_methods can name it")
    target = parse_target(method, request.uri)
    prefix, tail = split(target)
    fields = lines_of(request.headers)
    # Asked where there is something to ask about.
    expects = "Expect" in fields and expects_continue(request.version, request.headers, framing)
    upgrade = "Upgrade" in fields and wants_upgrade(request, framing)
    left = max_forwards(method, request.headers) if "Max-Forwards" in fields else None
    return Inbound(target, framing, tail, prefix, expects_continue=expects, upgrade=upgrade, max_forwards=left)
