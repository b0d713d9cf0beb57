"""One connection: what comes in, and what is done about it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from h2 import events
from h2.exceptions import ProtocolError
from tornado.log import app_log

from tornado_proxy.errors import BadRequest
from tornado_proxy.server.http2.ending import Http2EndingLink, Http2Server
from tornado_proxy.server.http2.engine import Engine
from tornado_proxy.server.http2.frames import (
    END_STREAM,
    ConnectionFault,
    Error,
    Frame,
    FrameReader,
    Type,
    known_settings,
    window_increment,
    window_update,
    with_end_stream,
)
from tornado_proxy.server.http2.heads import Malformed, request_head, request_trailers
from tornado_proxy.server.http2.limits import (
    CONNECTION_WINDOW,
    CONTROL_FRAMES_PER_REQUEST,
    MAX_CONTROL_FRAMES,
    Budget,
)
from tornado_proxy.server.http2.stream import RequestStream, own_answer

log = logging.getLogger(__name__)


class _EngineFault(Exception):
    """The connection cannot go on, and h2 has said so itself, in its last frame."""


class Http2Connection(Http2EndingLink):
    """Tornado's ``server_conn``."""

    def __init__(self, server: Http2Server) -> None:
        super().__init__(server)
        limits = server.http2_limits
        # A head that is too large gets an answer; one that is much too large is an attack on memory.
        most = 2 * server.max_header_size
        self.engine = Engine(limits, server.max_header_size, most)
        self._reader = FrameReader(most)
        now = self._loop.time()
        self._resets = Budget(limits.max_resets, now)
        self._control = Budget(MAX_CONTROL_FRAMES, now)
        # What connection-level flow control gives back next: of content that h2 has seen, and that it has not.
        self._taken = 0
        self._dropped_content = 0
        # The stream whose trailers came without END_STREAM, which h2 was shown with it; about to be cut.
        self._endless = 0
        # Octets that came when our side had ended.
        self._dropped = 0

    # -- the transport calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.schedule()
        if self._server.draining:
            self.begin_drain()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._ended:
            self._dropped += nbytes
            if self._dropped > self._server.linger_bytes:
                self.transport.close()
            return
        reader = self._reader
        reader.feed(self._server.buffer[:nbytes])
        try:
            while (frame := reader.next()) is not None:
                self._receive(frame)
        except ConnectionFault as fault:
            self._give_up(fault.code, str(fault))
            return
        except _EngineFault as fault:
            self._end_our_side(str(fault))
            return
        if not reader.block_of:
            self._block_deadline = math.inf
        elif self._block_deadline == math.inf:
            self._block_deadline = self._loop.time() + self._server.header_timeout
        self.schedule()
        if self.write_paused:
            self.hold_back()

    def eof_received(self) -> None:
        """Take the client for gone; returns nothing, so the transport closes itself once what was written is out."""
        self._ended = True
        self._lose_all()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        super().connection_lost(exc)
        self._lose_all()
        self._server.closed(self)

    # -- what has come

    def _receive(self, frame: Frame) -> None:
        """Take one frame: charge for it, keep from h2 what it must not see, and do what it makes of the rest."""
        type_, stream_id = frame.type, frame.stream_id
        raw = frame.raw
        if type_ == Type.DATA:
            forgotten = stream_id in self._forgotten
            if not (frame.size or frame.flags & END_STREAM) or not (forgotten or stream_id in self.streams):
                self._charge(frame)
            else:
                self._control.earn_bytes(frame.size)
            if forgotten:
                self._drop(frame.size)
                return
        elif type_ == Type.HEADERS:
            if stream_id in self.streams:
                if not frame.flags & END_STREAM:
                    # Trailers that end nothing (RFC 9113 section 8.1): h2 sees others, and the stream is cut.
                    self._endless = stream_id
                    raw = with_end_stream(frame)
            elif stream_id <= self.engine.highest_inbound_stream_id:
                self._charge(frame)
        elif type_ != Type.CONTINUATION:
            # Acknowledgements too: we ask for one, of our settings, and nobody would hold back a flood of others.
            self._charge(frame)
            if not self._is_for_h2(frame):
                return
            if type_ == Type.SETTINGS:
                raw = known_settings(frame)
        try:
            made = self.engine.receive_data(raw)
        except ProtocolError as error:
            raise _EngineFault(f"{type(error).__name__}: {error}") from error
        for event in made:
            handler = _HANDLERS.get(type(event))
            if handler is not None:
                handler(self, event)

    def _is_for_h2(self, frame: Frame) -> bool:
        """Whether h2 is to see a frame that is neither DATA nor HEADERS."""
        stream_id = frame.stream_id
        if frame.type == Type.GOAWAY:
            # h2 would send nothing more, and the client is waiting for its responses (RFC 9113 section 6.8).
            self._leaving = True
            self.stream_closed()
            return False
        if frame.type == Type.RST_STREAM:
            self._check_not_idle(stream_id)
        elif frame.type == Type.WINDOW_UPDATE and stream_id and not window_increment(frame):
            # RFC 9113 section 6.9.
            self._check_not_idle(stream_id)
            self._cut_off(stream_id, "WINDOW_UPDATE by nothing")
            return False
        # Unknown ones are to be ignored (section 5.5).
        return frame.type <= Type.CONTINUATION

    def _check_not_idle(self, stream_id: int) -> None:
        """RFC 9113 section 5.1: nothing but HEADERS and PRIORITY comes before HEADERS."""
        if stream_id > self.engine.highest_inbound_stream_id or not stream_id % 2:
            raise ConnectionFault(Error.PROTOCOL_ERROR, f"a frame on idle stream {stream_id}")

    def _on_request(self, event: events.RequestReceived) -> None:
        stream_id = event.stream_id
        server = self._server
        if self._refusing or len(self.streams) >= server.http2_limits.max_concurrent_streams:
            self._charge_reset()
            self.engine.reset_stream(stream_id, Error.REFUSED_STREAM)
            self.forget(stream_id)
            return
        self._last_id = stream_id
        ended = event.stream_ended is not None
        try:
            head = request_head(self.engine.fields, ended=ended, max_size=server.max_header_size)
        except Malformed as error:
            log.debug("a request from %s is malformed: %s", self.context, error)
            self._charge_reset()
            self.engine.reset_stream(stream_id, Error.PROTOCOL_ERROR)
            self.forget(stream_id)
            return
        except BadRequest as error:
            log.debug("refused a request from %s: %s", self.context, error)
            self.engine.send_headers(stream_id, own_answer(error.status_code), end_stream=True)
            if not ended:
                self.engine.reset_stream(stream_id, Error.NO_ERROR)
                self.forget(stream_id)
            return
        self.deadline = math.inf
        self._control.earn(CONTROL_FRAMES_PER_REQUEST)
        stream = RequestStream(self, stream_id, head, server.max_body_size)
        self.streams[stream_id] = stream
        try:
            delegate = server.start_request(self, stream)
        except Exception:
            app_log.error("Uncaught exception", exc_info=True)
            stream.fail(500)
            return
        stream.begin(delegate)

    def _on_data(self, event: events.DataReceived) -> None:
        size = event.flow_controlled_length or 0
        self._taken += size
        if 2 * self._taken >= CONNECTION_WINDOW:
            self.engine.increment_flow_control_window(self._taken)
            self._taken = 0
        stream = self.streams.get(event.stream_id)
        if stream is None:
            return
        data = event.data or b""
        try:
            stream.receive(data)
        except Malformed as error:
            self._cut_off(event.stream_id, str(error))
            return
        if size > len(data):
            # Padding, which nobody has to take.
            stream.take_padding(size - len(data))

    def _on_trailers(self, event: events.TrailersReceived) -> None:
        if event.stream_id == self._endless:
            self._cut_off(self._endless, "trailers without END_STREAM")
            return
        stream = self.streams.get(event.stream_id)
        try:
            trailers = request_trailers(self.engine.fields)
        except Malformed as error:
            self._cut_off(event.stream_id, str(error))
        except BadRequest as error:
            log.debug("refused the trailers of a request from %s: %s", self.context, error)
            if stream is not None:
                stream.fail(error.status_code)
        else:
            if stream is not None:
                stream.request_trailers = trailers

    def _on_end(self, event: events.StreamEnded) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is None:
            return
        try:
            stream.request_ended()
        except Malformed as error:
            self._cut_off(event.stream_id, str(error))

    def _on_reset(self, event: events.StreamReset) -> None:
        """Either side has cut the stream; h2 for something that the client did."""
        stream = self.streams.pop(event.stream_id, None)
        if not event.remote_reset:
            self.forget(event.stream_id)
        if stream is not None:
            stream.lose()
            self.stream_closed()
            self._charge_reset()

    def _on_window(self, event: events.WindowUpdated) -> None:
        stream = self.streams.get(event.stream_id or 0)
        if stream is not None and stream.outbox.waiting:
            self.enqueue(stream)

    def _on_settings(self, event: events.RemoteSettingsChanged) -> None:
        # The windows of all streams may be others now.
        for stream in self.streams.values():
            if stream.outbox.waiting:
                self.enqueue(stream)

    def _on_acknowledged(self, event: events.SettingsAcknowledged) -> None:
        self._acknowledged = True

    def _drop(self, size: int) -> None:
        """Take content of a stream that we have reset. The connection's window is all that it has cost."""
        self._dropped_content += size
        if 2 * self._dropped_content >= CONNECTION_WINDOW:
            # Past h2, which has not seen it.
            self.flush_engine()
            self.write(window_update(self._dropped_content))
            self._dropped_content = 0

    # -- guarding

    def _charge(self, frame: Frame) -> None:
        if not self._control.spend(self._loop.time()):
            raise ConnectionFault(Error.ENHANCE_YOUR_CALM, f"too many frames such as type {frame.type}")

    def _charge_reset(self) -> None:
        """Streams that come to nothing: cut by the client, or by us for what it did (CVE-2023-44487, CVE-2025-8671)."""
        if not self._resets.spend(self._loop.time()):
            raise ConnectionFault(Error.ENHANCE_YOUR_CALM, "too many streams that were cut")

    def content_sent(self, size: int) -> None:
        self._control.earn_bytes(size)

    def _cut_off(self, stream_id: int, why: str) -> None:
        """Cut a stream for what the client did on it."""
        stream = self.streams.get(stream_id)
        if stream is None:
            return
        log.debug("cut a stream from %s: %s", self.context, why)
        self.engine.reset_stream(stream_id, Error.PROTOCOL_ERROR)
        self.forget(stream_id)
        del self.streams[stream_id]
        stream.lose()
        self.stream_closed()
        self._charge_reset()


_HANDLERS: Mapping[type, Callable[[Http2Connection, Any], None]] = {
    events.RequestReceived: Http2Connection._on_request,
    events.DataReceived: Http2Connection._on_data,
    events.TrailersReceived: Http2Connection._on_trailers,
    events.StreamEnded: Http2Connection._on_end,
    events.StreamReset: Http2Connection._on_reset,
    events.WindowUpdated: Http2Connection._on_window,
    events.RemoteSettingsChanged: Http2Connection._on_settings,
    events.SettingsAcknowledged: Http2Connection._on_acknowledged,
}
