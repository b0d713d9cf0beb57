"""Whose turn it is to send: the lower half of a connection, with its streams.

Streams that have something to send stand in a queue. Each in its turn gets its heads and one frame of content out, and
goes to the end of the queue; so a large response does not keep a small one waiting, and the small one leaves with its
head in one piece. Everything goes in one write at the end of a turn of the loop, and nothing later than that.

A stream whose window is closed leaves the queue until it is opened. When the connection's is closed, or the kernel
takes no more, all wait where they are.
"""

from __future__ import annotations

from typing import Any

from h2.exceptions import ProtocolError
from tornado.log import app_log

from tornado_proxy.server.http2.engine import Engine
from tornado_proxy.server.http2.frames import MAX_FRAME_SIZE, Error
from tornado_proxy.server.http2.stream import RequestStream
from tornado_proxy.server.link import Link, Server

# Octets of content written in one turn of the loop, so that other connections have theirs.
WRITE_AT_ONCE = 256 * 1024
# Octets of answers that a client may leave unread before nothing more is read from it. A PING takes 17 of them.
MAX_UNREAD = 64 * 1024


class SendingLink(Link):
    """A link with streams."""

    engine: Engine

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.loop = server.loop
        # Those that neither side has closed, or not both.
        self.streams: dict[int, RequestStream] = {}
        # Those that have something to send and may.
        self._ready: list[RequestStream] = []
        # Those in which someone waits until everything is out.
        self._waiting: set[RequestStream] = set()
        # The end of this turn of the loop will see to it.
        self._scheduled = False
        # Octets written although the kernel takes no more: answers to what the client goes on sending.
        self._unread = 0

    # -- streams call these

    def window(self, stream_id: int) -> int:
        """Return how many octets of content the stream may send now; below 1 is none."""
        return self.engine.local_flow_control_window(stream_id) if stream_id in self.streams else 0

    def enqueue(self, stream: RequestStream) -> None:
        """Let the stream send when its turn comes."""
        if not stream.queued:
            stream.queued = True
            self._ready.append(stream)
        self.schedule()

    def wait_for_room(self, stream: RequestStream) -> None:
        """Call ``stream.written()`` when all that it has is out."""
        self._waiting.add(stream)

    def open_window(self, stream: RequestStream, size: int) -> int:
        """Let the client send ``size`` octets more on this stream; return how many of them were kept for later.

        Half a window at a time: a WINDOW_UPDATE for each frame would double what the client has to read.
        """
        if 2 * size < self.engine.local_settings.initial_window_size or stream.stream_id not in self.streams:
            return size
        self.engine.increment_flow_control_window(size, stream.stream_id)
        self.schedule()
        return 0

    # -- sending

    def schedule(self) -> None:
        """Send, at the end of this turn of the loop, what there is."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._scheduled = False
        if self.write_paused or self.transport.is_closing():
            return
        try:
            self._take_turns()
        except ProtocolError:
            # h2 refuses what we are about to send: our own mistake, and nobody knows what it means for the others.
            app_log.error("HTTP/2 connection to %s in a state that it cannot be in", self.context, exc_info=True)
            self.transport.abort()
            return
        self.flush_engine()
        if not self.write_paused:
            for stream in [stream for stream in self._waiting if not stream.outbox.size]:
                self._waiting.discard(stream)
                stream.written()
            if self._ready and self.engine.outbound_flow_control_window > 0:
                self.schedule()

    def flush_engine(self) -> None:
        """Write what h2 has ready."""
        data = self.engine.data_to_send()
        if data:
            self.write(data)

    def hold_back(self) -> None:
        """Read no more from a client that does not read our answers (PING, SETTINGS, refusals) to what it sends."""
        data = self.engine.data_to_send()
        if data:
            self.write(data)
            self._unread += len(data)
        if self._unread > MAX_UNREAD:
            self.pause_reading()

    def _take_turns(self) -> None:
        budget = WRITE_AT_ONCE
        while self._ready and budget > 0:
            round_, self._ready = self._ready, []
            for at, stream in enumerate(round_):
                if budget <= 0:
                    self._ready += round_[at:]
                    return
                stream.queued = False
                budget -= self._send_some(stream)
                if not stream.outbox.waiting or stream.stream_id not in self.streams:
                    continue
                if self.engine.outbound_flow_control_window <= 0:
                    # Not this one's fault; and others may have heads to send, which no window holds up.
                    stream.queued = True
                    self._ready.append(stream)
                elif self.window(stream.stream_id) > 0:
                    stream.queued = True
                    self._ready.append(stream)
            if self.engine.outbound_flow_control_window <= 0:
                return

    def _send_some(self, stream: RequestStream) -> int:
        """Send heads, at most one frame of content, and the end if that was all; return the size of the content."""
        engine, outbox, stream_id = self.engine, stream.outbox, stream.stream_id
        if stream_id not in self.streams:
            # It ended with its head, or was cut.
            return 0
        while outbox.heads:
            fields: Any = outbox.heads.popleft()
            ends = outbox.ends_here
            engine.send_headers(stream_id, fields, end_stream=ends)
            if ends:
                self._response_sent(stream)
                return 0
        size = 0
        if outbox.size:
            size = min(self.window(stream_id), MAX_FRAME_SIZE, outbox.size)
            if size <= 0:
                return 0
            data = outbox.take(size)
            size = len(data)
            ends = outbox.ends_here
            engine.send_data(stream_id, data, end_stream=ends)
            self.content_sent(size)
            if ends:
                self._response_sent(stream)
                return size
        if outbox.ended and not outbox.size:
            if outbox.trailers:
                trailers: Any = outbox.trailers
                engine.send_headers(stream_id, trailers, end_stream=True)
            else:
                engine.end_stream(stream_id)
            self._response_sent(stream)
        return size

    def _send_all(self, stream: RequestStream) -> None:
        """Send what the windows allow, at once: the stream is about to be cut."""
        if self.write_paused or self.transport.is_closing():
            return
        while stream.stream_id in self.streams and (stream.outbox.heads or stream.outbox.size):
            if not self._send_some(stream):
                return

    def _response_sent(self, stream: RequestStream) -> None:
        """END_STREAM was sent. What still comes is not wanted, and RFC 9113 section 8.1 has a way to say so."""
        del self.streams[stream.stream_id]
        if not stream.complete:
            self.engine.reset_stream(stream.stream_id, Error.NO_ERROR)
            self.forget(stream.stream_id)
            if not stream.finished:
                # It ended with its head. Whoever waits for the rest of the request waits in vain.
                stream.lose()
        self.stream_closed()

    # -- the upper half does these

    def content_sent(self, size: int) -> None:
        """Take note that so much content was sent."""
        raise NotImplementedError

    def forget(self, stream_id: int) -> None:
        """Let go of a stream that we have reset; what the client has sent before it learns that is dropped."""
        raise NotImplementedError

    def stream_closed(self) -> None:
        """Take note that there is one stream less."""
        raise NotImplementedError

    # -- the transport calls this

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = 0
        self.resume_reading()
        # Not from here: the transport is still in the middle of its write.
        self.schedule()
