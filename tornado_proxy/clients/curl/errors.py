"""libcurl's errors in our words."""

from __future__ import annotations

import pycurl

from tornado_proxy.errors import (
    ConnectError,
    ConnectTimeout,
    InvalidResponse,
    Phase,
    ProxyError,
    UpstreamClosed,
    UpstreamError,
)

# pycurl does not name them.
E_HTTP2_STREAM, E_HTTP3, E_QUIC_CONNECT = 92, 95, 96

# Class and phase. A phase of None follows from how far the transfer had come.
_ERRORS: dict[int, tuple[type[ProxyError], Phase | None]] = {
    pycurl.E_COULDNT_RESOLVE_HOST: (ConnectError, Phase.RESOLVE),
    pycurl.E_COULDNT_CONNECT: (ConnectError, Phase.CONNECT),
    # The only time limit that libcurl keeps for us is CONNECTTIMEOUT.
    pycurl.E_OPERATION_TIMEDOUT: (ConnectTimeout, Phase.CONNECT),
    pycurl.E_SSL_CONNECT_ERROR: (ConnectError, Phase.TLS),
    pycurl.E_PEER_FAILED_VERIFICATION: (ConnectError, Phase.TLS),
    pycurl.E_SSL_CERTPROBLEM: (ConnectError, Phase.TLS),
    pycurl.E_SSL_CIPHER: (ConnectError, Phase.TLS),
    pycurl.E_SSL_CACERT_BADFILE: (ConnectError, Phase.TLS),
    pycurl.E_SSL_ISSUER_ERROR: (ConnectError, Phase.TLS),
    pycurl.E_SEND_ERROR: (UpstreamClosed, Phase.SEND),
    pycurl.E_SEND_FAIL_REWIND: (UpstreamClosed, Phase.SEND),
    pycurl.E_GOT_NOTHING: (UpstreamClosed, Phase.HEAD),
    pycurl.E_RECV_ERROR: (UpstreamClosed, None),
    pycurl.E_PARTIAL_FILE: (UpstreamClosed, Phase.BODY),
    # Returned by our own PREREQFUNCTION: the connection died and a second try is not safe.
    pycurl.E_ABORTED_BY_CALLBACK: (UpstreamClosed, Phase.SEND),
    pycurl.E_UNSUPPORTED_PROTOCOL: (InvalidResponse, Phase.HEAD),
    pycurl.E_FTP_WEIRD_SERVER_REPLY: (InvalidResponse, None),
    pycurl.E_BAD_CONTENT_ENCODING: (InvalidResponse, None),
    pycurl.E_WRITE_ERROR: (InvalidResponse, None),
    pycurl.E_HTTP2: (UpstreamClosed, None),
    E_HTTP2_STREAM: (UpstreamClosed, None),
    E_HTTP3: (UpstreamClosed, None),
}


def map_error(errno: int, message: str, origin: str, so_far: Phase) -> ProxyError:
    """Return what ``errno`` and libcurl's ``message`` say of a transfer to ``origin`` that had come ``so_far``."""
    kind, phase = _ERRORS.get(errno, (UpstreamError, None))
    if errno == pycurl.E_RECV_ERROR and "chunk" in message:
        # libcurl has one code for a connection that broke and for a chunk that is none.
        kind = InvalidResponse
    return kind(f"upstream {origin}: {message or 'failed'} (libcurl {errno})", phase=phase or so_far, upstream=origin)
