"""The downstream's side of an exchange, as the forwarder sees it: who asked, the user's hooks, and how to answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container
from inspect import isawaitable
from typing import Any, Protocol

from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.web import Finish, HTTPError

from tornado_proxy.connections import ServerConnection
from tornado_proxy.errors import ProxyError
from tornado_proxy.messages import Outcome, UpstreamRequest, UpstreamResponse
from tornado_proxy.options import HeadersMode

# Logged, and never sent.
CLIENT_CLOSED = 499, "Client Closed Request"


class Hooks(Protocol):
    """The user's hooks, which may be sync or async."""

    def choose_upstream(self) -> Any: ...
    def rewrite_request(self, request: UpstreamRequest) -> Any: ...
    def filter_request_body(self, chunk: bytes) -> Any: ...
    def should_retry(self, error: ProxyError) -> Any: ...
    def handle_status(self, response: UpstreamResponse) -> Any: ...
    def rewrite_response(self, response: UpstreamResponse) -> Any: ...
    def filter_response_body(self, chunk: bytes) -> Any: ...
    def handle_error(self, error: ProxyError) -> Any: ...
    def on_done(self, outcome: Outcome) -> Any: ...


async def awaited(result: Any) -> Any:
    """Return what a hook returned, sync or async."""
    return await result if isawaitable(result) else result


class NoHooks:
    """The nine hooks where the user has given none; the upstream is still to be chosen."""

    __slots__ = ()

    def rewrite_request(self, request: UpstreamRequest) -> Any:
        return None

    def filter_request_body(self, chunk: bytes) -> Any:
        return chunk

    def should_retry(self, error: ProxyError) -> Any:
        return True

    def handle_status(self, response: UpstreamResponse) -> Any:
        return None

    def rewrite_response(self, response: UpstreamResponse) -> Any:
        return None

    def filter_response_body(self, chunk: bytes) -> Any:
        return chunk

    def handle_error(self, error: ProxyError) -> Any:
        return None


class Downstream(Protocol):
    """The downstream's side of one exchange."""

    request: HTTPServerRequest

    @property
    def timed(self) -> bool:
        """Whether anybody may look at how long what took."""

    @property
    def hooks(self) -> Hooks:
        """The user's hooks for this exchange."""

    def hooked(self, name: str) -> bool:
        """Whether the hook ``name`` is the user's, by keyword or by a method."""

    def get_status(self) -> int:
        """Return the status of the answer, as it stands."""

    def answer_status(self, raised: BaseException) -> int | None:
        """Return the status of the answer that ``raised`` stands for, ``None`` where it stands for none."""

    @property
    def answered(self) -> bool:
        """Whether a head has been sent, by a hook or by us."""

    @property
    def ended(self) -> bool:
        """Whether the answer is complete, or was cut off."""

    def send_interim(self, status: int, reason: str, headers: HTTPHeaders) -> None:
        """Send a 1xx response; nothing where the downstream does not know them."""

    def send_own_answer(self) -> None:
        """Answer an OPTIONS or TRACE that must not be forwarded any more."""

    def send_head(self, response: UpstreamResponse, mode: HeadersMode, chunk: bytes) -> asyncio.Future[None]:
        """Send status, headers and ``chunk`` in one write."""

    def send_chunk(self, chunk: bytes) -> asyncio.Future[None]:
        """Send ``chunk`` at once."""

    def send_end(self, response: UpstreamResponse | None = None) -> asyncio.Future[None]:
        """End the response well, with the trailers of ``response`` where it has any and the downstream takes them."""

    def fields_of(self, response: UpstreamResponse, mode: HeadersMode) -> HTTPHeaders:
        """Return the fields that ``send_head`` would send."""

    def detach(self) -> Any:
        """Give up the connection and return its stream; nothing else can be sent."""

    def tunnel_ended(self, status: int) -> None:
        """The connection that was given up is closed."""

    def send_error_page(self, error: ProxyError) -> None:
        """Answer ``error.status_code``; nothing was sent before."""

    def abort(self) -> None:
        """Close the connection so that the downstream sees that the response is not complete."""

    def gone(self) -> None:
        """The downstream left: nothing can be sent; there is only a log to write."""

    def unsent(self) -> int:
        """Return how many bytes wait for the downstream to read."""

    def has_left(self) -> bool:
        """Return whether the downstream has closed its side, though we are not reading."""


class OnConnection:
    """What every downstream does in the same way, with the server's connection below it."""

    __slots__ = ()

    request: HTTPServerRequest
    get_status: Callable[[], int]
    _connection: ServerConnection

    def answer_status(self, raised: BaseException) -> int | None:
        # As RequestHandler._handle_request_exception() tells them from failures.
        if isinstance(raised, HTTPError):
            return raised.status_code
        # What it ends is as the hook has left it, whatever else a subclass says.
        return self.get_status() if isinstance(raised, Finish) else None

    def send_interim(self, status: int, reason: str, headers: HTTPHeaders) -> None:
        # RFC 9110 section 15.2: never to a client of HTTP/1.0.
        if self.request.version != "HTTP/1.0":
            self._connection.send_interim(status, as_it_came(reason), headers)

    def unsent(self) -> int:
        return self._connection.unsent()

    def has_left(self) -> bool:
        return self._connection.has_left()

    def _cut_if_open(self) -> None:
        """Close a connection that is said to have ended, where it has not.

        Of a body whose compression breaks off (``decompress_request``) Tornado tells before it writes a 400, whatever
        it has written before.
        """
        if not self._connection.is_closed():
            self._connection.abort()

    def _let_end_be_seen(self, fields: Container[str]) -> None:
        """Let the connection end with a response whose client would else wait for an end that never comes."""
        if self.request.version != "HTTP/1.1" and "Content-Length" not in fields:
            self._connection.close_after_response()

    def _send_trailers(self, response: UpstreamResponse) -> None:
        """Let what came behind the body go behind it here, where the downstream takes that."""
        if self._connection.takes_trailers() and response.trailers:
            self._connection.set_trailers(response.trailers)


def as_it_came(reason: str) -> str:
    """Return what makes the bytes of ``reason``, one for each character, when a server writes it, which is in UTF-8."""
    if reason.isascii():
        return reason
    try:
        return reason.encode("latin-1").decode()
    except UnicodeError:
        # Nothing would; but then it is Latin-1 to whoever reads it, or a hook's.
        return reason
