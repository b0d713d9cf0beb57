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
from time import monotonic
from typing import Any

from tornado.httputil import HTTPHeaders
from tornado.iostream import StreamClosedError

from tornado_proxy import draining
from tornado_proxy.attempts import build_request, check_request, may_retry
from tornado_proxy.clients.base import HTTPClient
from tornado_proxy.downstream import Downstream, awaited
from tornado_proxy.errors import DownstreamClosed, HookError, Phase, ProxyError, Side, TunnelClosed, UpstreamError
from tornado_proxy.flow import BodyPipe
from tornado_proxy.framing import header_value_ok, response_may_have_body
from tornado_proxy.handshake import Switched, check_upgrade, head_bytes, shake_hands
from tornado_proxy.heads import beginning, clean_response, interim_headers, refuse_early
from tornado_proxy.inbound import Inbound
from tornado_proxy.messages import Outcome, UpstreamRequest, UpstreamResponse
from tornado_proxy.options import ProxyOptions, ResponseMode
from tornado_proxy.timeouts import Watchdog
from tornado_proxy.tunnel import Tunnel, downstream_side
from tornado_proxy.upload import Upload
from tornado_proxy.urls import UpstreamURL, parse_upstream

log = logging.getLogger(__name__)


async def refuse(downstream: Downstream, error: ProxyError) -> None:
    """Answer a request that cannot be forwarded at all: an exchange that ends at step (1)."""
    log.debug("%s: %s", downstream.request.method, error)
    outcome = Outcome(error.status_code, error.side, error=error, timings={"total": 0.0})
    try:
        await awaited(downstream.hooks.handle_error(error))
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
    upload: Upload | None = None
    _task: asyncio.Task[Any] | None = None
    # Why the exchange was stopped from outside (timeout, downstream gone); set at most once, by stop().
    _stopped: ProxyError | None = None
    # Set when the story is over, well or not; stop() does nothing from then on.
    _ending = False
    # Set at the commit, step (7): from then on errors can only abort.
    committed = False
    # Whether the exchange has become a tunnel, which then lasts.
    is_tunnel = False
    _request: UpstreamRequest | None = None
    _response: UpstreamResponse | None = None
    _upstream: UpstreamURL | None = None

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
        self._started = monotonic()
        self._watchdog = Watchdog(options, self.stop, downstream.unsent, downstream.has_left, loop)
        if inbound.body is None and (inbound.framing.chunked or inbound.framing.length is not None):
            takes_trailers = client.capabilities.request_trailers
            self.upload = Upload(self, downstream, options, self._watchdog, inbound.framing.length, takes_trailers)

    # -- what the downstream's connection tells us

    def receive(self, chunk: bytes) -> Any:
        """Take a piece of the inbound body; return ``None`` or an awaitable that is done when there is room."""
        return self.upload.receive(chunk) if self.upload is not None else None

    def received_all(self, trailers: HTTPHeaders | None = None) -> None:
        """The inbound body is complete, with ``trailers`` behind it."""
        if self.upload is not None:
            self.upload.received_all(trailers)

    def downstream_closed(self) -> None:
        """The downstream's connection is gone."""
        uploading = self.upload is not None and not self.upload.pipe.ended
        phase = Phase.SEND if uploading else Phase.HEAD if self._response is None else Phase.BODY
        error = DownstreamClosed("downstream closed its connection", phase=phase)
        if self.upload is not None:
            self.upload.pipe.fail(error)
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
                if self.committed:
                    self.downstream.abort()
                raise
            assert self._task is not None
            self._task.uncancel()
            if isinstance(self._stopped, HookError) and not self.committed:
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
            if self.downstream.answer_status(exc) is not None and not self.committed:
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
            await awaited(answering)
        if not downstream.answered:
            if self.options.response_mode is ResponseMode.BUFFER and self._may_have_body(response):
                await response.read()
            if (rewriting := hooks.rewrite_response(response)) is not None:
                await awaited(rewriting)
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
                chosen = await awaited(chosen)
            self._upstream = upstream = self._upstream_at(chosen)
            if upstream is None:
                return None
            # (3) Build what we shall send.
            self._request = request = build_request(
                self.downstream, self.options, self.inbound, self.upload, upstream, self.client.capabilities.te
            )
            request.on_interim = self._relay_interim
            request.fresh_connection = self.outcome.attempts > 1
            # (4) The user's last word.
            if (rewriting := self.hooks.rewrite_request(request)) is not None:
                await awaited(rewriting)
            if self.downstream.answered:
                return None
            check_request(request, self.downstream, self.options, self.upload)
            # (5) Send, again only if that is safe.
            try:
                return await self._send(request)
            except UpstreamError as error:
                self._watchdog.request_failed()
                if not await may_retry(request, error, self.downstream, self.options, self.outcome.attempts):
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
        if status == 100 and (not self.inbound.expects_continue or self._body_began()):
            return
        self.downstream.send_interim(status, reason, interim_headers(headers))

    def _body_began(self) -> bool:
        return self.upload is not None and self.upload.received > 0

    def _may_have_body(self, response: UpstreamResponse) -> bool:
        assert self.downstream.request.method is not None
        return response_may_have_body(self.downstream.request.method, response.status)

    async def _relay(self, response: UpstreamResponse) -> None:
        """Steps (7) and (8)."""
        downstream, hooks, options, stream = self.downstream, self.hooks, self.options, response.stream
        filtered = response.filtered and downstream.hooked("filter_response_body")
        filter_body = hooks.filter_response_body if filtered else None
        chunk, whole = await beginning(response, self._may_have_body(response), filter_body)
        # (7) Commit.
        if downstream.answered:
            return
        self.committed = True
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
                chunk = await awaited(hooks.filter_response_body(chunk))
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

    async def _tunnel(self, response: Switched) -> None:
        """Steps (7) and (8) of an upgrade: pass on the 101, then bytes both ways until both sides have ended."""
        downstream, options, outcome = self.downstream, self.options, self.outcome
        assert response.side is not None
        headers = downstream.fields_of(response, options.stream_headers_mode)
        head = head_bytes(f"HTTP/1.1 101 {response.reason}", headers)
        # (7) Commit.
        self.committed = self.is_tunnel = True
        stream = downstream.detach()
        try:
            try:
                side = await downstream_side(stream)
                if (room := side.write(head)) is not None:
                    await room
            except ConnectionError as exc:
                raise DownstreamClosed(
                    "downstream reset the tunnel", phase=Phase.UPGRADE, upstream=outcome.upstream
                ) from exc
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
        elif self.committed:
            self.downstream.abort()
        try:
            await awaited(self.hooks.handle_error(error))
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
        if not self.committed:
            outcome.status = error.status_code

    def _record_raised(self, exc: BaseException) -> None:
        """Note what a hook raised, which may be an answer, and is a failure else."""
        status = None if self.committed else self.downstream.answer_status(exc)
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
        if self.downstream.answered and not (self.committed or isinstance(outcome.error, DownstreamClosed)):
            # Not with the upstream's response, so by a hook or an error page, whatever it says.
            outcome.status = self.downstream.get_status()
        outcome.timings["total"] = monotonic() - self._started
        body = self._request.body if self._request is not None else None
        if isinstance(body, BodyPipe):
            outcome.bytes_up = body.consumed
        elif body is not None and self._response is not None:
            outcome.bytes_up = len(body)
        if self.upload is not None:
            self.upload.end()
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
            await awaited(telling)
    except Exception:
        log.exception("on_done raised")


def _drained(written: asyncio.Future[None]) -> bool:
    """Return whether a write is through. Raises when the downstream's connection is closed."""
    if not written.done():
        return False
    written.result()
    return True
