"""Websockets: on each of many connections one message at a time goes to the upstream and comes back."""

from __future__ import annotations

import os
import selectors
import socket
import time
from dataclasses import dataclass

from tests.benchmark.figures import Figures, percentile
from tests.benchmark.running import Running, Unfit

CONNECTIONS = 32
SIZE = 128
WARM_UP = 1.0

HANDSHAKE = (
    b"GET /echo HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
PAYLOAD = os.urandom(SIZE)
MASK = os.urandom(4)
MASKED = bytes(byte ^ MASK[at % 4] for at, byte in enumerate(PAYLOAD))
# RFC 6455, section 5.2: one frame, binary; the length in two further bytes.
ASKED = b"\x82" + bytes([128 | 126]) + SIZE.to_bytes(2) + MASK + MASKED
ECHOED = b"\x82" + bytes([126]) + SIZE.to_bytes(2) + PAYLOAD


@dataclass(slots=True)
class Speaker:
    """One connection: what is missing of the echo, and when its message was sent."""

    sock: socket.socket
    missing: int = len(ECHOED)
    sent: float = 0.0

    def send(self, now: float) -> None:
        self.missing, self.sent = len(ECHOED), now
        self.sock.send(ASKED)


def echo(running: Running, seconds: int) -> Figures:
    selector = selectors.DefaultSelector()
    speakers: list[Speaker] = []
    try:
        for _ in range(CONNECTIONS):
            speaker = Speaker(opened(running.port))
            speakers.append(speaker)
            selector.register(speaker.sock, selectors.EVENT_READ, speaker)
        for speaker in speakers:
            speaker.send(time.perf_counter())
        speak(selector, WARM_UP)
        with running.metered() as cost:
            took = speak(selector, seconds)
    except OSError as error:
        raise Unfit(repr(error)) from error
    finally:
        selector.close()
        for speaker in speakers:
            speaker.sock.close()
    return {
        "rate": len(took) / cost.seconds,
        "p50": percentile(took, 50),
        "p99": percentile(took, 99),
        **cost.figures(len(took) / 1e6),
    }


def opened(port: int) -> socket.socket:
    """Return a websocket whose first message came back as it was."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    sock.sendall(HANDSHAKE)
    got = b""
    while b"\r\n\r\n" not in got:
        data = sock.recv(4096)
        if not data:
            raise Unfit("a websocket handshake was not answered")
        got += data
    head, _, echoed = got.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101 "):
        raise Unfit(f"a websocket handshake was answered with {head[:12].decode('latin-1')}")
    sock.sendall(ASKED)
    while len(echoed) < len(ECHOED):
        data = sock.recv(4096)
        if not data:
            raise Unfit("a websocket was closed after its first message")
        echoed += data
    if echoed != ECHOED:
        raise Unfit(f"a message of {SIZE} bytes came back as {echoed[:20]!r}...")
    return sock


def speak(selector: selectors.BaseSelector, seconds: float) -> list[float]:
    """Send and wait in turn on all connections; return how many milliseconds each message took."""
    took: list[float] = []
    now = time.perf_counter()
    until = now + seconds
    while now < until:
        ready = selector.select(10)
        if not ready:
            raise Unfit("no message came back for 10 seconds")
        for key, _ in ready:
            speaker: Speaker = key.data
            data = speaker.sock.recv(4096)
            if not data:
                raise Unfit("a websocket was closed")
            speaker.missing -= len(data)
            if speaker.missing <= 0:
                now = time.perf_counter()
                took.append(1000 * (now - speaker.sent))
                speaker.send(now)
    return took
