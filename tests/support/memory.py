"""How many bytes of bodies this process holds, on their way through a proxy on the test's own loop."""

from __future__ import annotations

import gc

from tornado.iostream import IOStream

from tornado_proxy.flow import BodyPipe


def bytes_held() -> int:
    """Return what all pipes hold, and what all of Tornado's streams have read ahead or not yet written."""
    held = 0
    for found in gc.get_objects():
        # Not isinstance(), which would wake lazy objects that are none of our business.
        if type(found) is BodyPipe:
            held += found.held
        elif type(found) is IOStream and not found.closed():
            held += found._read_buffer_size + len(found._write_buffer)
    return held
