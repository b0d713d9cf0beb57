"""Streams: many that are idle but for an event a second, and one whose chunks say when they were sent."""

from __future__ import annotations

import contextlib
import http.client
import selectors
import socket
import statistics
import time

from tests.benchmark.figures import Figures, percentile
from tests.benchmark.running import SMALL, Running, Unfit, check

STREAMS = 500
# Processor time is counted in hundredths of a second, of which 500 idle streams take few.
WATCHED = 10.0
OPENING = 10.0


class Listeners:
    """Streams of events that are read and counted."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._sockets: list[socket.socket] = []
        self.silent: set[socket.socket] = set()  # without an event so far
        self.events = 0
        self.ended = 0

    def open(self, port: int) -> None:
        sock = socket.create_connection(("127.0.0.1", port), timeout=OPENING)
        sock.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n")
        self._sockets.append(sock)
        self.silent.add(sock)
        self._selector.register(sock, selectors.EVENT_READ)

    def read(self, until: float) -> None:
        """Read whatever comes until this time of ``time.monotonic()``, or until every stream had an event."""
        opening = bool(self.silent)
        while (left := until - time.monotonic()) > 0 and not (opening and not self.silent):
            for key, _ in self._selector.select(left):
                assert isinstance(key.fileobj, socket.socket)
                self._take(key.fileobj)

    def _take(self, sock: socket.socket) -> None:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = sock.recv(65536)
        if not data:
            self._selector.unregister(sock)
            self.ended += 1
        elif sock in self.silent:
            if data.startswith(b"HTTP/") and not data.startswith(b"HTTP/1.1 200 "):
                raise Unfit(f"a stream of events was answered with {data[:12].decode('latin-1')}")
            if b"data: " in data:
                self.silent.discard(sock)
        else:
            self.events += data.count(b"data: ")

    def close(self) -> None:
        self._selector.close()
        for sock in self._sockets:
            sock.close()


def events(running: Running, seconds: int) -> Figures:
    """Hold 500 streams open for ten seconds, or ``seconds`` if that is longer."""
    # What is loaded with the first request is not a stream's.
    check(running.port, "GET", "/", 0, SMALL)
    idle = running.memory()
    listeners = Listeners()
    watched = max(WATCHED, seconds)
    try:
        for _ in range(STREAMS):
            listeners.open(running.port)
        listeners.read(time.monotonic() + OPENING)
        if listeners.silent:
            raise Unfit(f"of {STREAMS} streams {len(listeners.silent)} had no event in {OPENING:.0f} s")
        with running.metered() as cost:
            listeners.read(time.monotonic() + watched)
        grown = running.memory() - idle
    except OSError as error:
        raise Unfit(repr(error)) from error
    finally:
        listeners.close()
    if listeners.events < 0.9 * STREAMS * watched:
        raise Unfit(f"{listeners.events} of {STREAMS * watched:.0f} events arrived")
    return {
        **cost.figures(STREAMS),
        "each": grown / STREAMS / 1000,
        "idle": idle / 1e6,
        "errors": listeners.ended,
    }


def delay(running: Running, seconds: int) -> Figures:
    """Ask directly and through the proxy for a stream of stamped chunks, and compare how old they are on arrival."""
    with running.metered() as cost:
        direct, through = ages(running.upstream, seconds / 2), ages(running.port, seconds)
    return {
        "added": statistics.median(through) - statistics.median(direct),
        "added p99": percentile(through, 99) - percentile(direct, 99),
        "direct": statistics.median(direct),
        "direct p99": percentile(direct, 99),
        **cost.figures(len(through)),
    }


def ages(port: int, seconds: float) -> list[float]:
    """Return how many milliseconds each chunk took to get here; the first ones do not count."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    found: list[float] = []
    try:
        connection.request("GET", "/stamps")
        answer = connection.getresponse()
        if answer.status != 200:
            raise Unfit(f"GET /stamps: {answer.status}")
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            line = answer.readline()
            found.append((time.monotonic_ns() - int(line)) / 1e6)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unfit(f"GET /stamps: {error!r}") from error
    finally:
        connection.close()
    # Whatever buffers, sends several at once: the first of them are old.
    return found[len(found) // 10 :]
