"""How a connection ends: when nobody needs it any more, by the clock, or for what the client did.

It may be told that it has no future (GOAWAY) and live until its streams have ended. Then our side is ended, and what
still comes is dropped for a while, because closing would become a reset that destroys what the client has not read:
RFC 9112 section 9.6 says so of HTTP/1.1, and TCP does not know the difference.
"""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Protocol

from tornado_proxy.server.http2.frames import NO_STREAM, Error, goaway
from tornado_proxy.server.http2.limits import Limits
from tornado_proxy.server.http2.sending import SendingLink
from tornado_proxy.server.http2.stream import RequestStream
from tornado_proxy.server.link import Server

log = logging.getLogger(__name__)

# How many of the streams that we have reset are remembered: what the client sent on them before it knew is no error.
_REMEMBERED = 1000


class Http2Server(Server, Protocol):
    """What a connection needs of its server, the limits of HTTP/2 included."""

    http2_limits: Limits


class Http2EndingLink(SendingLink):
    """A link that knows how to end its streams and itself."""

    _server: Http2Server

    def __init__(self, server: Http2Server) -> None:
        super().__init__(server)
        # The last request that was looked at.
        self._last_id = 0
        # Streams that we have reset lately, oldest first.
        self._forgotten: dict[int, None] = {}
        # The client has heard of our settings.
        self._acknowledged = False
        # The client has sent GOAWAY: it will ask for nothing more.
        self._leaving = False
        # Streams above the last one are refused: the second GOAWAY was sent.
        self._refusing = False
        # Our side has ended; what comes is dropped.
        self._ended = False
        # When a field block that has begun must be complete. ``deadline`` counts only while there are no streams.
        self._block_deadline = math.inf

    # -- streams and the lower half call these

    def cut(self, stream: RequestStream, code: Error) -> None:
        """Reset a stream; what may still be sent of it goes first. The stream refuses everything from now on."""
        self._send_all(stream)
        if self.streams.pop(stream.stream_id, None) is not None and not self._ended:
            self.engine.reset_stream(stream.stream_id, code)
            self.forget(stream.stream_id)
            self.schedule()
        stream.closed()
        self.stream_closed()

    def forget(self, stream_id: int) -> None:
        self._forgotten[stream_id] = None
        if len(self._forgotten) > _REMEMBERED:
            del self._forgotten[next(iter(self._forgotten))]

    def stream_closed(self) -> None:
        if not self.streams and not self._ended:
            server = self._server
            ending = self._leaving or server.draining
            self.deadline = self._loop.time() + (server.linger_time if ending else server.idle_timeout)
            if self._refusing:
                # Not from here: the last response is about to be written.
                self._loop.call_soon(self._end_if_done)

    # -- ending

    def begin_drain(self) -> None:
        """Ask the client to open no more streams here; those that are on their way are served (section 6.8)."""
        if not self._ended:
            self.flush_engine()
            self.write(goaway(NO_STREAM, Error.NO_ERROR))

    @property
    def idle(self) -> bool:
        """It can be told to end whatever runs: that is finished first."""
        return True

    def close_idle(self) -> None:
        """Take no more requests, and close when those that run are answered."""
        if self._ended or self._refusing:
            return
        self._refusing = True
        self.flush_engine()
        self.write(goaway(self._last_id, Error.NO_ERROR))
        self._end_if_done()

    def _end_if_done(self) -> None:
        if not self.streams and not self._ended:
            self._end_our_side("done")

    def _give_up(self, code: Error, why: str) -> None:
        """End the connection for what the client did to it (RFC 9113 section 5.4.1)."""
        if not self._ended:
            self.flush_engine()
            self.write(goaway(self._last_id, code))
            self._end_our_side(why)

    def _end_our_side(self, why: str) -> None:
        """Say that nothing follows, and read on until the client ends too or the time is up."""
        log.debug("ending the connection to %s: %s", self.context, why)
        self.flush_engine()
        self._ended = True
        self.resume_reading()
        self._lose_all()
        self.deadline = self._loop.time() + self._server.linger_time
        if not self.tls and not self.transport.is_closing():
            # TLS has an end of its own, which must come first.
            with contextlib.suppress(OSError):  # it has gone; the transport is about to notice
                self.transport.write_eof()

    def _lose_all(self) -> None:
        streams, self.streams = self.streams, {}
        self._ready, self._waiting = [], set()
        for stream in streams.values():
            stream.lose()

    def sweep(self, now: float) -> None:
        """Look after what only time can tell; called about once a second."""
        if self.reading_paused and not self._ended and self.has_left():
            # Its bytes wait in the kernel in front of its end, which we shall therefore not read soon.
            self._ended = True
            self.transport.close()
            self._lose_all()
        if self._ended:
            if now >= self.deadline:
                self._close(now)
        elif now >= self._block_deadline:
            self._give_up(Error.NO_ERROR, "a field block that does not end")
        elif not self.streams and now >= self.deadline:
            self._idle_too_long(now)
        else:
            for stream in list(self.streams.values()):
                stream.sweep(now)

    def _idle_too_long(self, now: float) -> None:
        if (unsent := self.transport.get_write_buffer_size()) and unsent != self._unsent_at_sweep:
            # It is still reading the last response.
            self._unsent_at_sweep = unsent
            self.deadline = now + self.write_stall
        else:
            code = Error.NO_ERROR if self._acknowledged else Error.SETTINGS_TIMEOUT
            self._give_up(code, "idle for too long")

    def _close(self, now: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent != self._unsent_at_sweep:
            self._unsent_at_sweep = unsent
            self.deadline = now + self.write_stall
        elif unsent:
            self.transport.abort()
        else:
            self.transport.close()
