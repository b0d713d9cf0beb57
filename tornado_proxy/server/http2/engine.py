"""h2, and what is kept from it.

It gets one frame at a time, so that one that is wrong takes nothing of those before it with it, and it gets no fields:
what it would say about them, it would say about the whole connection. All that is used is public; where h2 takes more
than is good (streams that were closed, tables as large as the client likes) its own knobs are turned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings
from hpack import Decoder, Encoder, HPACKDecodingError, HPACKError, OversizedHeaderListError

from tornado_proxy.server.http2.frames import PREFACE, ConnectionFault, Error
from tornado_proxy.server.http2.heads import Fields
from tornado_proxy.server.http2.limits import CONNECTION_WINDOW, Limits

# Octets of the table that we compress with (RFC 7541 section 4.2). The client may allow more; it is our memory.
TABLE_SIZE = 4096

# More than two at the beginning of a block (RFC 7541 section 4.2): each is one octet to send and a loop to read.
_SIZE_UPDATES = re.compile(rb"(?:[\x20-\x3e]|\x3f[\x80-\xff]*[\x00-\x7f]){3}")
# What h2 is shown in place of the fields: something that is a request, and has no length.
_SHOWN: Any = [(b":method", b"GET")]
_DEFAULT_WINDOW = 65535


class _FieldDecoder(Decoder):
    """Keeps the fields of the last block, and shows h2 none."""

    def __init__(self, max_size: int) -> None:
        # Beyond it the block is not read to its end, and no other one can be read after it: HPACK is then broken.
        super().__init__(max_header_list_size=max_size)
        self.fields: Fields = []

    def decode(self, data: bytes, raw: bool = False) -> Iterable[Any]:
        # The last ones are not held any longer than the next take.
        self.fields = []
        try:
            if _SIZE_UPDATES.match(data):
                raise HPACKDecodingError("too many table size updates")
            self.fields = list(super().decode(data, raw=True))
        except OversizedHeaderListError as error:
            raise ConnectionFault(Error.ENHANCE_YOUR_CALM, str(error)) from error
        except HPACKError as error:
            # RFC 9113 section 4.3. h2 would say PROTOCOL_ERROR.
            raise ConnectionFault(Error.COMPRESSION_ERROR, str(error)) from error
        shown: Iterable[Any] = _SHOWN
        return shown


class _FieldEncoder(Encoder):
    """Compresses by the table only: Huffman's code in Python takes more time than the octets are worth.

    The time of hpack's grows with the square of a value's length, too.
    """

    def encode(self, headers: Any, huffman: bool = True) -> bytes:
        # hpack 4.2 forgets a change that was followed by the same value once more.
        self.header_table.resized = bool(self.table_size_changes)
        return super().encode(headers, huffman=False)

    @property
    def header_table_size(self) -> int:
        return self.header_table.maxsize

    @header_table_size.setter
    def header_table_size(self, value: int) -> None:
        size = min(value, TABLE_SIZE)
        if size != self.header_table.maxsize:
            self.header_table.maxsize = size
            self.table_size_changes.append(size)


class Engine(H2Connection):
    """The state of one connection; what it has to send first is ready, and it has had the preface."""

    # Frames on a stream that was closed longer ago are errors of the connection. h2 would remember 65536.
    MAX_CLOSED_STREAMS = 1000

    decoder: _FieldDecoder

    def __init__(self, limits: Limits, max_header_size: int, max_block: int) -> None:
        config = H2Configuration(
            client_side=False,
            header_encoding=None,
            validate_inbound_headers=False,
            normalize_inbound_headers=False,
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        super().__init__(config)
        self.decoder = _FieldDecoder(max_block)
        self.encoder = _FieldEncoder()
        self.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: limits.max_concurrent_streams,
                SettingCodes.INITIAL_WINDOW_SIZE: limits.initial_window_size,
                SettingCodes.MAX_HEADER_LIST_SIZE: max_header_size,
            },
        )
        self.initiate_connection()
        # Counting the streams is ours: h2 would end the connection with all of them where one is too many.
        self.local_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 2**31 - 1
        self.local_settings.acknowledge()
        self.receive_data(PREFACE)
        self.increment_flow_control_window(CONNECTION_WINDOW - _DEFAULT_WINDOW)

    @property
    def fields(self) -> Fields:
        """The fields of the block that was received last."""
        return self.decoder.fields
