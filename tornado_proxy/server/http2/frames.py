"""Cuts frames out of what was received, and says what is wrong with them before anyone looks inside.

RFC 9113 sections 3.4, 4 and 6: the preface, which frame may stand where, how long it may be. All of it is bounded: one
frame of 16 KiB and one field block of ``max_block`` bytes is the most that is ever held. Pure; nothing here knows h2.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# SETTINGS_MAX_FRAME_SIZE, which stays what it is without our saying so (RFC 9113 section 4.2).
MAX_FRAME_SIZE = 16384
HEADER_SIZE = 9
NO_STREAM = 2**31 - 1


class Type(IntEnum):
    """Frame types (RFC 9113 section 6)."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Error(IntEnum):
    """Error codes (RFC 9113 section 7), those that are used here."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    SETTINGS_TIMEOUT = 4
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


# Flags. ACK is for SETTINGS and PING.
ACK = END_STREAM = 0x1
END_HEADERS = 0x4

# Which stand on a stream, and which on the connection. WINDOW_UPDATE does both.
_ON_STREAM = frozenset({Type.DATA, Type.HEADERS, Type.PRIORITY, Type.RST_STREAM, Type.CONTINUATION})
_ON_CONNECTION = frozenset({Type.SETTINGS, Type.PING, Type.GOAWAY})
_LENGTHS: dict[int, int] = {Type.PRIORITY: 5, Type.RST_STREAM: 4, Type.PING: 8, Type.WINDOW_UPDATE: 4}
# SETTINGS that mean something. Any other is ignored (section 6.5.2), and there are so many that h2 must not keep them.
_KNOWN_SETTINGS = frozenset({1, 2, 3, 4, 5, 6, 8})


class ConnectionFault(Exception):
    """The connection cannot go on (RFC 9113 section 5.4.1)."""

    def __init__(self, code: Error, why: str) -> None:
        super().__init__(why)
        self.code = code


class Frame(NamedTuple):
    """One frame. ``type`` may be one that nobody knows; ``raw`` is all of it, with its header."""

    type: int
    flags: int
    stream_id: int
    raw: bytes

    @property
    def size(self) -> int:
        """Octets of payload: what flow control counts of DATA."""
        return len(self.raw) - HEADER_SIZE


class FrameReader:
    """Takes bytes, gives frames. After a :class:`ConnectionFault` it is not used any more."""

    def __init__(self, max_block: int) -> None:
        self._max_block = max_block
        self._received = bytearray()
        # How much of the preface has come.
        self._preface = 0
        # Any frame has come.
        self.begun = False
        # The stream whose field block is not complete, or 0; and what there is of it.
        self.block_of = 0
        self._block_size = 0

    def feed(self, data: bytes | memoryview) -> None:
        """Take what was received."""
        self._received += data

    def next(self) -> Frame | None:
        """Return the next frame, ``None`` until it is complete. Raises :class:`ConnectionFault`."""
        received = self._received
        if self._preface < len(PREFACE) and not self._read_preface():
            return None
        if len(received) < HEADER_SIZE:
            return None
        high, low, type_, flags, stream_id = struct.unpack_from(">BHBBL", received)
        size = high << 16 | low
        stream_id &= NO_STREAM
        # Now, and not when all of it is here.
        self._check(type_, flags, stream_id, size)
        if len(received) < HEADER_SIZE + size:
            return None
        raw = bytes(received[: HEADER_SIZE + size])
        del received[: HEADER_SIZE + size]
        self.begun = True
        if type_ in (Type.HEADERS, Type.CONTINUATION):
            self._block_size = size + (self._block_size if self.block_of else 0)
            self.block_of = 0 if flags & END_HEADERS else stream_id
        return Frame(type_, flags, stream_id, raw)

    def _read_preface(self) -> bool:
        """Section 3.4: 24 octets that no server of HTTP/1.1 would take for a request."""
        received = self._received
        expected = PREFACE[self._preface : self._preface + len(received)]
        if not received.startswith(expected):
            raise ConnectionFault(Error.PROTOCOL_ERROR, "this is not the preface of HTTP/2")
        del received[: len(expected)]
        self._preface += len(expected)
        return self._preface == len(PREFACE)

    def _check(self, type_: int, flags: int, stream_id: int, size: int) -> None:
        if not self.begun and (type_ != Type.SETTINGS or flags & ACK):
            raise ConnectionFault(Error.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if self.block_of and (type_ != Type.CONTINUATION or stream_id != self.block_of):
            raise ConnectionFault(Error.PROTOCOL_ERROR, "a frame inside of a field block")
        if size > MAX_FRAME_SIZE:
            raise ConnectionFault(Error.FRAME_SIZE_ERROR, f"a frame of {size} octets")
        if _LENGTHS.get(type_, size) != size:
            raise ConnectionFault(Error.FRAME_SIZE_ERROR, f"a frame of type {type_} with {size} octets")
        if type_ == Type.SETTINGS and (size % 6 or (flags & ACK and size)):
            raise ConnectionFault(Error.FRAME_SIZE_ERROR, f"SETTINGS with {size} octets")
        if type_ == Type.GOAWAY and size < 8:
            raise ConnectionFault(Error.FRAME_SIZE_ERROR, f"GOAWAY with {size} octets")
        if (type_ in _ON_STREAM and not stream_id) or (type_ in _ON_CONNECTION and stream_id):
            raise ConnectionFault(Error.PROTOCOL_ERROR, f"a frame of type {type_} on stream {stream_id}")
        if type_ == Type.CONTINUATION and not self.block_of:
            raise ConnectionFault(Error.PROTOCOL_ERROR, "CONTINUATION of nothing")
        if type_ == Type.PUSH_PROMISE:
            raise ConnectionFault(Error.PROTOCOL_ERROR, "PUSH_PROMISE from a client")
        if type_ == Type.HEADERS and size > self._max_block:
            raise ConnectionFault(Error.ENHANCE_YOUR_CALM, "too large a field block")
        if type_ == Type.CONTINUATION and self._block_size + size > self._max_block:
            raise ConnectionFault(Error.ENHANCE_YOUR_CALM, "too large a field block")


def with_end_stream(frame: Frame) -> bytes:
    """Return HEADERS as if they had END_STREAM."""
    return b"%b%c%b" % (frame.raw[:4], frame.flags | END_STREAM, frame.raw[5:])


def known_settings(frame: Frame) -> bytes:
    """Return SETTINGS without those that mean nothing."""
    payload = frame.raw[HEADER_SIZE:]
    pairs = [payload[at : at + 6] for at in range(0, len(payload), 6)]
    known = b"".join([pair for pair in pairs if pair[0] == 0 and pair[1] in _KNOWN_SETTINGS])
    return header(Type.SETTINGS, len(known), flags=frame.flags) + known


def window_increment(frame: Frame) -> int:
    """Return what a WINDOW_UPDATE adds."""
    increment: int = struct.unpack_from(">L", frame.raw, HEADER_SIZE)[0]
    return increment & NO_STREAM


def header(type_: Type, size: int, *, flags: int = 0, stream_id: int = 0) -> bytes:
    """Return the header of a frame."""
    return struct.pack(">BHBBL", size >> 16, size & 0xFFFF, type_, flags, stream_id)


def goaway(last_stream_id: int, code: Error) -> bytes:
    """Return GOAWAY: no stream above ``last_stream_id`` was or will be looked at (section 6.8)."""
    return header(Type.GOAWAY, 8) + struct.pack(">LL", last_stream_id, code)


def window_update(increment: int) -> bytes:
    """Return a WINDOW_UPDATE of the connection."""
    return header(Type.WINDOW_UPDATE, 4) + struct.pack(">L", increment)
