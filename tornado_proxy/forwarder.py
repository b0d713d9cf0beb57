"""The story: one exchange, from the inbound request to its outcome.

::

    downstream                  tornado_proxy                                              upstream
     request in  -(1) inbound: read-only; framing and target judged by us
                 -(2) choose_upstream    -> where to
                 -(3) UpstreamRequest built: method, url, headers, body
                 -(4) rewrite_request    -> the user's last word; validated, not changed
                 -(5) client.send(request)                                       --> head, then body as it comes
                       failed before a byte left, or provably safe -> should_retry -> (2)
                 -(6) UpstreamResponse head  <-------------------------------------- status, headers
                       cleaned -> handle_status / rewrite_response; 101 -> tunnel
     head        <(7) commit: after this line an error can only abort
     chunks      <(8) each chunk: filter, write, wait for the drain
     end | cut   <(9) on_done(outcome): exactly once, whatever happened

The forwarder knows no ``RequestHandler``: whoever holds the downstream is a :class:`Downstream`.
"""

from __future__ import annotations

import asyncio
import logging
from inspect import isawaitable
from time import monotonic
from typing import Any

from tornado.httputil import HTTPHeaders
from tornado.iostream import StreamClosedError

from tornado_proxy import draining
from tornado_proxy.clients.base import HTTPClient
from tornado_proxy.downstream import Downstream
from tornado_proxy.errors import (
    BadRequest,
    BodyTooLarge,
    ConnectTimeout,
    DownstreamClosed,
    HookError,
    Phase,
    ProxyError,
    Retry,
    Side,
    TunnelClosed,
    UpstreamError,
)
from tornado_proxy.flow import BodyPipe
from tornado_proxy.framing import header_value_ok, response_may_have_body
from tornado_proxy.handshake import Switched, check_upgrade, head_bytes, shake_hands
from tornado_proxy.headers import body_changed, lines_of, remove_range
from tornado_proxy.heads import (
    check_rewritten,
    check_trailers,
    clean_response,
    interim_headers,
    pass_trailers,
    refuse_changed_part,
    refuse_early,
    takes_trailers,
    upstream_headers,
)
from tornado_proxy.inbound import Inbound
from tornado_proxy.messages import Outcome, UpstreamRequest, UpstreamResponse
from tornado_proxy.options import ProxyOptions, ResponseMode
from tornado_proxy.timeouts import Watchdog
from tornado_proxy.tunnel import Tunnel, downstream_side
from tornado_proxy.urls import UpstreamURL, escapes_base, join_url, parse_upstream, whole_server

log = logging.getLogger(__name__)

# What may be repeated although the upstream may have read it: the safe methods (RFC 9110 section 9.2.1). PUT and DELETE
# are idempotent too, but only in the eyes of who sends them: others may have acted in between.
_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


async def refuse(downstream: Downstream, error: ProxyError) -> None:
    """Answer a request that cannot be forwarded at all: an exchange that ends at step (1)."""
    log.debug("%s: %s", downstream.request.method, error)
    outcome = Outcome(error.status_code, error.side, error=error, timings={"total": 0.0})
    try:
        await _awaited(downstream.hooks.handle_error(error))
        if not downstream.answered:
            downstream.send_error_page(error)
        outcome.status = downstream.get_status()
    finally:
        await _told(downstream, outcome)


class Exchange:
    """One inbound request and what becomes of it. :meth:`run` is the story; the other methods tell it what happens.

    Nothing raised by a hook, client or connection escapes the cleaning up at the end of :meth:`run`.
    """

    # Defaults on the class: most exchanges never set most of these, and an instance then need not be given them.

    # The inbound body on its way up; None when there is none or it was read before.
    upload: BodyPipe | None = None
    # Bytes of it that came.
    _received = 0
    _task: asyncio.Task[Any] | None = None
    # Why the exchange was stopped from outside (timeout, downstream gone); set at most once, by stop().
    _stopped: ProxyError | None = None
    # Set when the story is over, well or not; stop() does nothing from then on.
    _ending = False
    # Set at the commit, step (7): from then on errors can only abort.
    _committed = False
    # The downstream, which waited, has been told to send its body.
    _continued = False
    # Whether the exchange has become a tunnel, which then lasts.
    is_tunnel = False
    _request: UpstreamRequest | None = None
    _response: UpstreamResponse | None = None
    _upstream: UpstreamURL | None = None
    # What came behind the inbound body, and may be wanted upstream.
    _trailers: HTTPHeaders | None = None

    def __init__(
        self,
        downstream: Downstream,
        options: ProxyOptions,
        client: HTTPClient,
        inbound: Inbound,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.downstream = downstream
        self.hooks = downstream.hooks
        self.options = options
        self.client = client
        self.inbound = inbound
        self._loop = loop
        self.outcome = Outcome()
        if inbound.body is None and (inbound.framing.chunked or inbound.framing.length is not None):
            filtered = downstream.hooked("filter_request_body")
            self.upload = BodyPipe(options.buffer_size, None if filtered else inbound.framing.length)
        self._started = monotonic()
        self._watchdog = Watchdog(options, self.stop, downstream.unsent, downstream.has_left, loop)

    # -- what the downstream's connection tells us

    def receive(self, chunk: bytes) -> Any:
        """Take a piece of the inbound body; return ``None`` or an awaitable that is done when there is room."""
        self._received += len(chunk)
        limit = self.options.max_body_size
        if limit is not None and self._received > limit:
            self.stop(BodyTooLarge(f"request body exceeds {limit} bytes", phase=Phase.SEND))
            return None
        if self.upload is None:
            return None
        if self.downstream.hooked("filter_request_body"):
            return self._receive_filtered(chunk)
        room = self.upload.write(chunk)
        if room is not None:
            self._watchdog.upload_blocked()
        return room

    async def _receive_filtered(self, chunk: bytes) -> None:
        assert self.upload is not None
        try:
            chunk = await _awaited(self.hooks.filter_request_body(chunk))
            if self.downstream.answered and not self._committed:
                self.stop(HookError("filter_request_body has answered", phase=Phase.SEND))
                return
            room = self.upload.write(chunk)
        except ProxyError as error:
            self.stop(error)
            return
        except Exception as exc:
            failure = HookError("filter_request_body raised", phase=Phase.SEND)
            failure.__cause__ = exc
            self.stop(failure)
            return
        if room is not None:
            self._watchdog.upload_blocked()
            await room

    def received_all(self, trailers: HTTPHeaders | None = None) -> None:
        """The inbound body is complete, with ``trailers`` behind it."""
        upload = self.upload
        if upload is None:
            return
        if trailers is not None and upload.length is None and self.client.capabilities.request_trailers:
            try:
                self._trailers = check_trailers(self.options, trailers)
                if self._request is not None:
                    self._pass_trailers(self._request)
            except HookError as error:
                upload.fail(error)
                self.stop(error)
        upload.close()
        self._watchdog.upload_ended()

    def _pass_trailers(self, request: UpstreamRequest) -> None:
        if request.body is self.upload and self.client.capabilities.request_trailers:
            hooked = self.downstream.hooked("rewrite_request")
            pass_trailers(self._trailers, self.downstream.request, request, hooked)

    def downstream_closed(self) -> None:
        """The downstream's connection is gone."""
        uploading = self.upload is not None and not self.upload.ended
        phase = Phase.SEND if uploading else Phase.HEAD if self._response is None else Phase.BODY
        error = DownstreamClosed("downstream closed its connection", phase=phase)
        if self.upload is not None:
            self.upload.fail(error)
        self.stop(error)

    def stop(self, error: ProxyError) -> None:
        """End the exchange with ``error``, wherever it is waiting. The first call counts."""
        if self._stopped is None and not self._ending:
            self._stopped = error
            if self._task is not None:
                self._task.cancel()

    def end(self) -> asyncio.Task[Any]:
        """End the exchange because the process ends; return the task that does."""
        assert self._task is not None
        what = "the process is about to end"
        if self.is_tunnel:
            self.stop(TunnelClosed(what, phase=Phase.UPGRADE, upstream=self.outcome.upstream))
        else:
            error = ProxyError(what, upstream=self.outcome.upstream)
            error.status_code = 503
            self.stop(error)
        return self._task

    # -- the story

    async def run(self) -> None:
        """Forward the request and relay the response.

        Raises only what a hook raised before anything was sent, for the caller to answer as it answers its own errors.
        """
        self._task = asyncio.current_task(self._loop)
        draining.began(self)
        try:
            if self._stopped is not None:
                raise self._stopped
            await self._forward()
            if self.downstream.answered and not (self.downstream.ended or self.is_tunnel):
                # A hook has flushed and left it at that; Tornado ends such an answer when a method returns.
                await self._drain(self.downstream.send_end())
        except asyncio.CancelledError:
            if self._stopped is None:
                self._record(DownstreamClosed("exchange was cancelled"))
                if self._committed:
                    self.downstream.abort()
                raise
            assert self._task is not None
            self._task.uncancel()
            if isinstance(self._stopped, HookError) and not self._committed:
                # By filter_request_body, which is not called from here: what it did counts as with the other hooks.
                if self.downstream.answered:
                    return
                raised = self._stopped.__cause__
                if raised is not None and self.downstream.answer_status(raised) is not None:
                    self._record_raised(raised)
                    raise raised from None
            await self._fail(self._stopped)
        except ProxyError as error:
            await self._fail(error)
        except StreamClosedError as closed:
            # The write's future refers to it, it to our frames, and one of them to that future.
            closed.__traceback__ = None
            await self._fail(DownstreamClosed("downstream closed its connection", phase=Phase.BODY))
        except Exception as exc:
            self._record_raised(exc)
            if not self.downstream.answered:
                raise
            if self.downstream.answer_status(exc) is not None and not self._committed:
                raise
            log.exception("exchange failed after its head was sent")
            self.downstream.abort()
        finally:
            await self._finish()

    async def _forward(self) -> None:
        downstream, hooks = self.downstream, self.hooks
        # (1) to (5)
        response = await self._obtain_response()
        if response is None:
            return
        # (6) Clean the head, then the user's word on it.
        assert self._upstream is not None
        clean_response(response, self.options, self.inbound, downstream.request, self._upstream)
        self.outcome.status = response.status
        if (answering := hooks.handle_status(response)) is not None:
            await _awaited(answering)
        if not downstream.answered:
            if self.options.response_mode is ResponseMode.BUFFER and self._may_have_body(response):
                await response.read()
            if (rewriting := hooks.rewrite_response(response)) is not None:
                await _awaited(rewriting)
        if downstream.answered:
            response.abort()
            return
        # Steps (7) and (8) follow.
        if isinstance(response, Switched):
            if response.status == 101:
                await self._tunnel(response)
                return
            response.abort()
        await self._relay(response)

    async def _obtain_response(self) -> UpstreamResponse | None:
        """Steps (1) to (5); ``None`` when a hook has answered."""
        source = self.downstream.request
        refuse_early(self.options, self.inbound, source)
        if self.inbound.upgrade:
            check_upgrade(source, self.options)
            if draining.draining():
                raise TunnelClosed("no new tunnels: the process is about to end", phase=Phase.UPGRADE)
        if self.inbound.max_forwards == 0:
            self.downstream.send_own_answer()
            return None
        while True:
            self.outcome.attempts += 1
            # (2) Choose where to.
            chosen = self.hooks.choose_upstream()
            if not isinstance(chosen, str):
                chosen = await _awaited(chosen)
            self._upstream = upstream = self._upstream_at(chosen)
            if upstream is None:
                return None
            # (3) Build what we shall send.
            self._request = request = self._build_request(upstream)
            # (4) The user's last word.
            if (rewriting := self.hooks.rewrite_request(request)) is not None:
                await _awaited(rewriting)
            if self.downstream.answered:
                return None
            self._check_request(request)
            # (5) Send, again only if that is safe.
            try:
                return await self._send(request)
            except UpstreamError as error:
                if not await self._may_retry(request, error):
                    raise
                # Nobody sees it any more. It refers to the client's frames, and they to it.
                error.__traceback__ = None

    def _upstream_at(self, chosen: Any) -> UpstreamURL | None:
        """Return the upstream that ``choose_upstream`` has chosen, ``None`` where it has answered instead."""
        if self.downstream.answered:
            return None
        try:
            upstream = parse_upstream(chosen, self.downstream.request.protocol)
        except (ValueError, TypeError, AttributeError) as exc:
            raise HookError(f"choose_upstream returned {chosen!r}: {exc}") from exc
        self.outcome.upstream = upstream.origin
        return upstream

    def _build_request(self, upstream: UpstreamURL) -> UpstreamRequest:
        options, inbound, source = self.options, self.inbound, self.downstream.request
        if escapes_base(upstream.path, inbound.tail):
            raise BadRequest("request target leaves the upstream's base path")
        assert source.method is not None
        target = inbound.target
        headers = upstream_headers(options, inbound, source)
        if "Range" in lines_of(headers) and self.downstream.hooked("filter_response_body"):
            # The filter needs all of it, and ranges of what it makes are not those of the upstream's body.
            remove_range(headers)
        if self.client.capabilities.te and takes_trailers(source):
            headers["Te"] = "trailers"
        return UpstreamRequest(
            source.method,
            whole_server(upstream) if target.path == "*" else join_url(upstream, inbound.tail, target.query),
            headers,
            self.upload if inbound.body is None else inbound.body,
            source,
            connect_timeout=options.connect_timeout,
            fresh_connection=self.outcome.attempts > 1,
            buffer_size=options.buffer_size,
            expect_continue=inbound.expects_continue and not self._received,
            on_interim=self._relay_interim,
            timed=self.downstream.timed,
            upgrade=inbound.upgrade,
        )

    def _check_request(self, request: UpstreamRequest) -> None:
        if request.body is not self.upload and self.upload is not None:
            # Replaced: what still arrives has nowhere to go.
            self.upload.discard()
        if not isinstance(request.body, BodyPipe):
            request.expect_continue = False
        elif request.body.length is None:
            self._pass_trailers(request)
        if request.body is not None and not isinstance(request.body, bytes | BodyPipe):
            raise HookError(f"rewrite_request set the body to {type(request.body).__name__}; assign bytes or None")
        if request.method != "GET" or request.body is not None:
            # No handshake any more (RFC 6455 section 4.1).
            request.upgrade = False
        if self.downstream.hooked("rewrite_request") or self.options.normalize_headers:
            check_rewritten(request)

    async def _send(self, request: UpstreamRequest) -> UpstreamResponse:
        upload = request.body if isinstance(request.body, BodyPipe) else None
        handshake = request.upgrade and self.inbound.upgrade
        connecting = handshake or self.client.capabilities.tells_sending
        self._watchdog.request_started(upload, self.outcome.upstream or "", connecting=connecting)
        if connecting:
            request.on_sending = self._watchdog.sending_began
        if handshake:
            response = await shake_hands(request, self.options.client_options)
        else:
            response = await self.client.send(request)
        response.max_size = self.options.max_buffered_response
        self._response = response
        self._watchdog.head_received(response)
        return response

    def _relay_interim(self, status: int, reason: str, headers: HTTPHeaders) -> None:
        """Pass a 1xx on (RFC 9110 section 15.2), but a 100 only to those who wait for it."""
        if self._ending or self.downstream.answered or not header_value_ok(reason):
            return
        if status == 100:
            if not self.inbound.expects_continue or self._received:
                return
            self._continued = True
        self.downstream.send_interim(status, reason, interim_headers(headers))

    async def _may_retry(self, request: UpstreamRequest, error: ProxyError) -> bool:
        """Whether another attempt cannot make the upstream act twice (RFC 9110 section 9.2.2)."""
        if self.outcome.attempts > self.options.retries or error.retry is Retry.NEVER:
            return False
        if isinstance(request.body, BodyPipe) and request.body.consumed:
            return False
        if error.retry is Retry.IF_IDEMPOTENT and request.method not in _REPEATABLE:
            return False
        if isinstance(error, ConnectTimeout) and isinstance(self.options.upstream, str):
            # The same address would take as long again.
            return False
        allowed = await _awaited(self.hooks.should_retry(error))
        return allowed is None or bool(allowed)

    def _may_have_body(self, response: UpstreamResponse) -> bool:
        assert self.downstream.request.method is not None
        return response_may_have_body(self.downstream.request.method, response.status)

    async def _relay(self, response: UpstreamResponse) -> None:
        """Steps (7) and (8)."""
        downstream, hooks, options, stream = self.downstream, self.hooks, self.options, response.stream
        filtered = response.filtered and downstream.hooked("filter_response_body")
        chunk, whole = await self._beginning(response, filtered)
        # (7) Commit.
        if downstream.answered:
            return
        if self.inbound.expects_continue and not (self._continued or self._received):
            # Whether its body still comes is the downstream's choice (RFC 9110 section 10.1.1), and cannot be told from
            # a next request.
            downstream.close_after_response()
        self._committed = True
        self.outcome.status = response.status
        buffered = options.response_mode is ResponseMode.BUFFER
        mode = options.buffer_headers_mode if buffered else options.stream_headers_mode
        written = downstream.send_head(response, mode, chunk)
        self.outcome.bytes_down += len(chunk)
        if not _drained(written):
            await self._drain(written)
        # (8) Each chunk as it comes.
        while not (whole or stream.exhausted):
            chunk = await stream.read()
            if not chunk:
                break
            if filtered:
                chunk = await _awaited(hooks.filter_response_body(chunk))
                if downstream.ended:
                    # The filter has ended the response where it wants it to end.
                    return
                if not chunk:
                    continue
            written = downstream.send_chunk(chunk)
            self.outcome.bytes_down += len(chunk)
            if not _drained(written):
                await self._drain(written)
        written = downstream.send_end(response)
        if not _drained(written):
            await self._drain(written)

    async def _beginning(self, response: UpstreamResponse, filtered: bool) -> tuple[bytes, bool]:
        """Return the bytes to send with the head, and whether there are no others; make the head true of the body.

        They are none where there is no body (HEAD, 204, 304), all where it was read before or is a hook's, else those
        that have come. ``filtered`` is whether ``filter_response_body`` is asked.
        """
        if not self._may_have_body(response):
            if filtered or response.body is not None:
                # HEAD and 304 speak of the body that a GET would bring.
                body_changed(response.headers, None)
            if response.status == 204 and "Content-Length" in response.headers:
                # A hook has made it a 204 (RFC 9110 section 8.6).
                del response.headers["Content-Length"]
            return b"", True
        if response.body is not None:
            chunk = response.body
            if filtered:
                chunk = await _awaited(self.hooks.filter_response_body(chunk))
            if filtered or response.body_replaced:
                refuse_changed_part(response)
                body_changed(response.headers, len(chunk))
            else:
                response.headers["Content-Length"] = str(len(chunk))
            return chunk, True
        if filtered or response.stream.consumed:
            refuse_changed_part(response)
            body_changed(response.headers, None)
        chunk = response.stream.read_nowait()
        if filtered and chunk:
            chunk = await _awaited(self.hooks.filter_response_body(chunk))
        return chunk, False

    async def _tunnel(self, response: Switched) -> None:
        """Steps (7) and (8) of an upgrade: pass on the 101, then bytes both ways until both sides have ended."""
        downstream, options, outcome = self.downstream, self.options, self.outcome
        assert response.side is not None
        headers = downstream.fields_of(response, options.stream_headers_mode)
        head = head_bytes(f"HTTP/1.1 101 {response.reason}", headers)
        # (7) Commit.
        self._committed = self.is_tunnel = True
        stream = downstream.detach()
        try:
            side = await downstream_side(stream)
            if (room := side.write(head)) is not None:
                await room
            tunnel = Tunnel(
                side, response.side, origin=outcome.upstream or "", idle_timeout=options.tunnel_idle_timeout
            )
            # (8) Each chunk as it comes.
            try:
                await tunnel.run()
            finally:
                outcome.bytes_up, outcome.bytes_down = tunnel.bytes_up, tunnel.bytes_down
        finally:
            stream.close()
            downstream.tunnel_ended(response.status)

    async def _drain(self, written: asyncio.Future[None]) -> None:
        if not self.downstream.unsent():
            return
        self._watchdog.write_blocked()
        await written
        self._watchdog.write_drained()

    # -- the end

    async def _fail(self, error: ProxyError) -> None:
        self._ending = True
        self._record(error)
        if self._response is not None:
            self._response.abort()
        if error.side is Side.UPSTREAM:
            log.warning("%s %s: %s", self.downstream.request.method, self._path(), error)
        elif error.side is Side.DOWNSTREAM or isinstance(error, TunnelClosed):
            log.debug("%s %s: %s", self.downstream.request.method, self._path(), error)
        else:
            log.error("%s %s: %s", self.downstream.request.method, self._path(), error, exc_info=error.__cause__)
        # Where nothing more can be sent, that is settled before a hook tries.
        if isinstance(error, DownstreamClosed):
            self.downstream.gone()
        elif self._committed:
            self.downstream.abort()
        try:
            await _awaited(self.hooks.handle_error(error))
        except Exception:
            log.exception("handle_error raised")
        if not self.downstream.answered:
            self.downstream.send_error_page(error)

    def _path(self) -> str:
        # Without the query, which may hold secrets.
        return self.inbound.target.path

    def _record(self, error: ProxyError) -> None:
        outcome = self.outcome
        outcome.error = error
        outcome.side = error.side
        outcome.phase = error.phase
        if not self._committed:
            outcome.status = error.status_code

    def _record_raised(self, exc: BaseException) -> None:
        """Note what a hook raised, which may be an answer, and is a failure else."""
        status = None if self._committed else self.downstream.answer_status(exc)
        if status is None:
            error = HookError(f"a hook raised {type(exc).__name__}")
            error.__cause__ = exc
            self._record(error)
        else:
            self.outcome.status = status

    async def _finish(self) -> None:
        """Step (9): let go of everything, then tell."""
        self._ending = True
        self._watchdog.stop()
        if self._response is not None:
            if not self._response.stream.ended or isinstance(self._response, Switched):
                self._response.abort()
            self.outcome.timings.update(self._response.timings)
        outcome = self.outcome
        if self.downstream.answered and not (self._committed or isinstance(outcome.error, DownstreamClosed)):
            # Not with the upstream's response, so by a hook or an error page, whatever it says.
            outcome.status = self.downstream.get_status()
        outcome.timings["total"] = monotonic() - self._started
        body = self._request.body if self._request is not None else None
        if isinstance(body, BodyPipe):
            outcome.bytes_up = body.consumed
        elif body is not None and self._response is not None:
            outcome.bytes_up = len(body)
        if self.upload is not None:
            self.upload.discard()
        # What refers to us in a circle waits for the garbage collector, which costs more than the rest of an exchange.
        self._task = self._request = self._response = None
        draining.ended(self)
        await _told(self.downstream, outcome)
        if outcome.error is not None:
            # It refers to our frames, and so to the last chunk, and they to it.
            outcome.error.__traceback__ = None


async def _told(downstream: Downstream, outcome: Outcome) -> None:
    try:
        if (telling := downstream.hooks.on_done(outcome)) is not None:
            await _awaited(telling)
    except Exception:
        log.exception("on_done raised")


async def _awaited(result: Any) -> Any:
    """Return what a hook returned, sync or async."""
    return await result if isawaitable(result) else result


def _drained(written: asyncio.Future[None]) -> bool:
    """Return whether a write is through. Raises when the downstream's connection is closed."""
    if not written.done():
        return False
    written.result()
    return True
