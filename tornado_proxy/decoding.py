"""Content codings undone in steps (RFC 9110 section 8.4.1): gzip, deflate, br, zstd, and several one inside the other.

Pure: bytes in, bytes out, and no step gives more than it was asked for, so that a few bytes that stand for a gigabyte
cost no more memory than any others. br and zstd are there where a library that can be bounded like this is installed.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any, Protocol

# More than this many codings on one body are an attack, or a mistake.
_MAX_CODINGS = 4
# RFC 9659: who decodes zstd need not hold a window above 8 MiB.
_ZSTD_WINDOW_LOG = 23


class DecodingError(ValueError):
    """A coding that is not known here, or bytes that are not what the coding says."""


class Decoder(Protocol):
    """Undoes a coding, for one body."""

    @property
    def needs_input(self) -> bool:
        """Whether all that was given has been used; only then may :meth:`decode` be given more."""

    def decode(self, data: bytes, limit: int) -> bytes:
        """Return about ``limit`` bytes at most; fewer, or none, mean that it needs input. Raises ``DecodingError``.

        brotli rounds the limit up to its next block: 96 KiB for 64 KiB.
        """

    def end(self) -> None:
        """Raise ``DecodingError`` unless the input was complete. No input at all is an empty body."""


def decoder_for(content_encoding: str) -> Decoder | None:
    """Return a decoder for the value of a Content-Encoding; ``None`` where it names nothing that must be undone.

    Raises ``DecodingError``, which names the coding and the cure.
    """
    names = [name.strip(" \t").lower() for name in content_encoding.split(",")]
    names = [name for name in names if name not in ("", "identity")]
    if len(names) > _MAX_CODINGS:
        raise DecodingError(f"{len(names)} content codings on one body are more than {_MAX_CODINGS}")
    decoder: Decoder | None = None
    for name in names:
        make = _DECODERS.get(name)
        if make is None:
            raise DecodingError(f"content coding {name!r} is not one of gzip, deflate, br and zstd")
        # They were applied in this order, so the last one named is undone first.
        decoder = make() if decoder is None else _Chain(make(), decoder)
    return decoder


def decode_whole(decoder: Decoder, data: bytes, limit: int | None) -> bytes:
    """Return all of ``data`` decoded. Raises ``DecodingError``, also where that is more than ``limit`` bytes."""
    pieces = []
    size = 0
    piece = decoder.decode(data, _STEP)
    while piece or not decoder.needs_input:
        pieces.append(piece)
        size += len(piece)
        if limit is not None and size > limit:
            raise DecodingError(f"decoded body is larger than {limit} bytes")
        piece = decoder.decode(b"", _STEP)
    decoder.end()
    return b"".join(pieces)


# Bytes of one step where the caller wants all.
_STEP = 256 * 1024


class _Zlib:
    """gzip (RFC 1952) with any number of members, and deflate (RFC 1950) with its header or, as many send it, without.

    Which of the two forms a deflate has is seen from its first two bytes.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._inflate: Any = zlib.decompressobj(31) if name == "gzip" else None
        # Given, and not used yet.
        self._rest = b""
        # zlib may hold output back although it has used all input.
        self._more = False
        self._empty = True

    @property
    def needs_input(self) -> bool:
        return not self._more

    def decode(self, data: bytes, limit: int) -> bytes:
        data = self._rest + data if self._rest else data
        self._rest, self._more = b"", False
        if not data and self._empty:
            return b""
        self._empty = False
        if self._inflate is None:
            if len(data) < 2:
                self._rest = data
                return b""
            self._inflate = zlib.decompressobj(15 if _is_zlib(data) else -15)
        while True:
            if self._inflate.eof and not self._next_member(data):
                return b""
            try:
                decoded: bytes = self._inflate.decompress(data, limit)
            except zlib.error as exc:
                raise DecodingError(f"not a valid {self._name} body: {exc}") from None
            data = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
            if decoded or not data:
                self._rest = data
                self._more = bool(data) or len(decoded) == limit
                return decoded

    def _next_member(self, data: bytes) -> bool:
        """Begin with the member that follows; return whether there is one. Zeros, which fill up blocks, are none."""
        if not data.strip(b"\0"):
            return False
        if self._name != "gzip":
            raise DecodingError(f"bytes behind the end of a {self._name} body")
        self._inflate = zlib.decompressobj(31)
        return True

    def end(self) -> None:
        if not self._empty and (self._inflate is None or not self._inflate.eof):
            raise DecodingError(f"{self._name} body is cut short")


def _is_zlib(data: bytes) -> bool:
    """Return whether ``data`` begins as RFC 1950 section 2.2 says."""
    return data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0


class _Brotli:
    """br (RFC 7932), by the package brotli."""

    def __init__(self) -> None:
        library = _library("brotli", "br", "brotli>=1.2")
        if not hasattr(library.Decompressor, "can_accept_more_data"):
            # Older ones cannot be bounded.
            raise DecodingError("content coding 'br' needs a newer brotli: pip install 'brotli>=1.2'")
        self._error = library.error
        self._decompressor = library.Decompressor()
        self._empty = True
        # Output is held back, perhaps although all input was used.
        self._more = False

    @property
    def needs_input(self) -> bool:
        return not self._more

    def decode(self, data: bytes, limit: int) -> bytes:
        if not data and not self._more:
            return b""
        self._empty = False
        if self._decompressor.is_finished():
            raise DecodingError("bytes behind the end of a br body")
        try:
            decoded: bytes = self._decompressor.process(data, output_buffer_limit=limit)
        except self._error as exc:
            raise DecodingError(f"not a valid br body: {exc}") from None
        held = len(decoded) >= limit or not self._decompressor.can_accept_more_data()
        self._more = held and not self._decompressor.is_finished()
        return decoded

    def end(self) -> None:
        if not self._empty and not self._decompressor.is_finished():
            raise DecodingError("br body is cut short")


class _Zstd:
    """zstd (RFC 8878) with any number of frames, by ``compression.zstd`` of Python 3.14 or its backport."""

    def __init__(self) -> None:
        self._library = _library("compression.zstd backports.zstd", "zstd", "backports.zstd")
        self._frame = self._new_frame()
        self._empty = True
        # Of the frames that follow.
        self._rest = b""

    def _new_frame(self) -> Any:
        options = {self._library.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        return self._library.ZstdDecompressor(options=options)

    @property
    def needs_input(self) -> bool:
        return not self._rest and (self._empty or self._frame.eof or self._frame.needs_input)

    def decode(self, data: bytes, limit: int) -> bytes:
        data = self._rest + data if self._rest else data
        self._rest = b""
        if data:
            self._empty = False
        while data or not self.needs_input:
            if self._frame.eof:
                self._frame = self._new_frame()
            try:
                decoded: bytes = self._frame.decompress(data, limit)
            except self._library.ZstdError as exc:
                raise DecodingError(f"not a valid zstd body: {exc}") from None
            data = self._frame.unused_data if self._frame.eof else b""
            if decoded:
                self._rest = data
                return decoded
            if not self._frame.eof:
                break
        return b""

    def end(self) -> None:
        if not self._empty and not self._frame.eof:
            raise DecodingError("zstd body is cut short")


class _Chain:
    """A coding inside another: what ``outer`` gives is decoded by ``inner``."""

    def __init__(self, outer: Decoder, inner: Decoder) -> None:
        self._outer = outer
        self._inner = inner

    @property
    def needs_input(self) -> bool:
        return self._inner.needs_input and self._outer.needs_input

    def decode(self, data: bytes, limit: int) -> bytes:
        decoded = b""
        while not decoded and (data or not self.needs_input):
            between = b""
            if self._inner.needs_input:
                between, data = self._outer.decode(data, limit), b""
            decoded = self._inner.decode(between, limit)
        return decoded

    def end(self) -> None:
        self._outer.end()
        self._inner.end()


def _library(modules: str, coding: str, package: str) -> Any:
    """Return the first of ``modules`` that is installed."""
    for module in modules.split():
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise DecodingError(f"content coding {coding!r} needs a library: pip install '{package}'")


_DECODERS: dict[str, Callable[[], Decoder]] = {
    "gzip": lambda: _Zlib("gzip"),
    "x-gzip": lambda: _Zlib("gzip"),
    "deflate": lambda: _Zlib("deflate"),
    "br": _Brotli,
    "zstd": _Zstd,
}
