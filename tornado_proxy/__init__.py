"""A composable, streaming reverse proxy for Tornado applications.

>>> from tornado.web import Application
>>> from tornado_proxy import mount
>>> app = Application([mount("/foo", "http://127.0.0.1:9000/bar")])
"""

from tornado_proxy._version import __version__
from tornado_proxy.clients.base import HTTPClient
from tornado_proxy.errors import (
    BadRequest,
    BodyTooLarge,
    ConnectError,
    ConnectTimeout,
    DownstreamClosed,
    DownstreamTimeout,
    HookError,
    InvalidResponse,
    LoopDetected,
    NoUpstreamAvailable,
    Phase,
    ProxyError,
    Side,
    TunnelClosed,
    UpstreamClosed,
    UpstreamError,
    UpstreamTimeout,
)
from tornado_proxy.handlers import ProxyHandler
from tornado_proxy.messages import Outcome, UpstreamRequest, UpstreamResponse
from tornado_proxy.mixin import ProxyMixin
from tornado_proxy.options import OptionError, ProxyOptions
from tornado_proxy.routing import mount

__all__ = [
    "BadRequest",
    "BodyTooLarge",
    "ConnectError",
    "ConnectTimeout",
    "DownstreamClosed",
    "DownstreamTimeout",
    "HTTPClient",
    "HookError",
    "InvalidResponse",
    "LoopDetected",
    "NoUpstreamAvailable",
    "OptionError",
    "Outcome",
    "Phase",
    "ProxyError",
    "ProxyHandler",
    "ProxyMixin",
    "ProxyOptions",
    "Side",
    "TunnelClosed",
    "UpstreamClosed",
    "UpstreamError",
    "UpstreamRequest",
    "UpstreamResponse",
    "UpstreamTimeout",
    "__version__",
    "mount",
]
