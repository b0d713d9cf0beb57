"""A response's body decoded as it is read: what the reader of a `BodyPipe` asks for, over one."""

from __future__ import annotations

import asyncio

from tornado_proxy.decoding import Decoder, DecodingError
from tornado_proxy.errors import InvalidResponse, Phase
from tornado_proxy.flow import BodyPipe

# Bytes that one read gives at most; a decoder may round that up (`Decoder.decode`).
_STEP = 64 * 1024
# Bytes that may be decoded before others get their turn of the loop: a few milliseconds.
_TURN = 1024 * 1024


class DecodedStream:
    """The decoded body of ``source``. While nobody reads, nothing is decoded and the source fills up, as it should.

    Bytes that are not what the coding says raise :class:`~tornado_proxy.errors.InvalidResponse` from the read that
    meets them, and so does a source that ends too early.
    """

    __slots__ = ("_decoder", "_finished", "_turn", "_upstream", "consumed", "source")

    def __init__(self, source: BodyPipe, decoder: Decoder, upstream: str) -> None:
        self.source = source
        # Decoded bytes that the reader has had.
        self.consumed = 0
        self._decoder = decoder
        self._upstream = upstream
        # The end was reached, and was the right one.
        self._finished = False
        # Bytes decoded since others had a turn.
        self._turn = 0

    @property
    def ended(self) -> bool:
        """Whether the upstream has sent all that it will; bytes may still be held."""
        return self.source.ended

    @property
    def exhausted(self) -> bool:
        """Whether the body ended well and every byte was read."""
        return self._finished

    async def read(self) -> bytes:
        """Return what is held, up to about 64 KiB, waiting for the first byte; ``b""`` is the end."""
        while not self._finished:
            chunk = self._decode(b"") if not self._decoder.needs_input else b""
            if not chunk:
                raw = await self.source.read()
                chunk = self._decode(raw) if raw else self._end()
            if chunk:
                if self._turn > _TURN:
                    self._turn = 0
                    await asyncio.sleep(0)
                return chunk
        return b""

    def read_nowait(self) -> bytes:
        """Return what :meth:`read` would, or nothing where it would wait."""
        chunk = b""
        while not chunk:
            raw = self.source.read_nowait() if self._decoder.needs_input else b""
            if not raw and self._decoder.needs_input:
                return b""
            chunk = self._decode(raw)
        return chunk

    def discard(self) -> None:
        """Drop what is held and all that will come."""
        self.source.discard()

    def _decode(self, raw: bytes) -> bytes:
        try:
            chunk = self._decoder.decode(raw, _STEP)
        except DecodingError as exc:
            raise self._invalid(exc) from None
        self.consumed += len(chunk)
        self._turn += len(chunk)
        return chunk

    def _end(self) -> bytes:
        try:
            self._decoder.end()
        except DecodingError as exc:
            raise self._invalid(exc) from None
        self._finished = True
        return b""

    def _invalid(self, exc: DecodingError) -> InvalidResponse:
        return InvalidResponse(f"upstream {self._upstream} sent: {exc}", phase=Phase.BODY, upstream=self._upstream)
