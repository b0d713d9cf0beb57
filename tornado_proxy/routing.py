"""mount(): a routing rule for a literal prefix, its options checked when the application is built."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from tornado.httputil import HTTPServerRequest
from tornado.routing import Matcher, Rule

from tornado_proxy.handlers import ProxyHandler
from tornado_proxy.inbound import Mounted
from tornado_proxy.options import OptionError, ProxyOptions
from tornado_proxy.urls import tail_below

# What stays as it is in a path (RFC 3986 section 3.3), and "%", which may be somebody's quoting already.
_SAFE = "/%!$&'()*+,;=:@"


class PrefixMatches(Matcher):
    """Matches a path that is ``prefix`` or below it, at a segment's boundary, byte for byte.

    ``"/"`` matches whatever was asked for, so that what cannot be forwarded gets the proxy's own answer (400).
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        if not self.prefix:
            return {}
        path = request.path
        if not path.startswith("/"):
            # Absolute-form, http://host/path (RFC 9112 section 3.2.2).
            _, slash, path = path.partition("://")[2].partition("/")
            path = slash + path
        return None if tail_below(self.prefix, path) is None else {}

    def reverse(self, *args: Any) -> str | None:
        """Return the URL of ``args[0]`` below the mount, for ``reverse_url``."""
        return self.prefix + (str(args[0]) if args else "")


def mount(
    prefix: str,
    upstream: Any = None,
    handler_class: type[ProxyHandler] = ProxyHandler,
    *,
    name: str | None = None,
    **options: Any,
) -> Rule:
    """Return a rule for ``Application([...])`` that forwards ``prefix`` and all below it to ``upstream``.

    ``mount("/foo", "http://example.com/bar")`` turns ``/foo/a%2Fb?x=1`` into ``http://example.com/bar/a%2Fb?x=1``;
    ``/foobar`` does not match. The prefix is as clients send it, percent-encoded. ``options`` are those of
    :class:`~tornado_proxy.options.ProxyOptions`; ``name`` is Tornado's, for ``reverse_url``. Raises
    :class:`~tornado_proxy.options.OptionError`.
    """
    where = f"mount({prefix!r})".replace("'", '"')
    if not isinstance(prefix, str) or not prefix.startswith("/"):
        raise OptionError(f"{where}: prefix does not begin with a slash; write {'/' + str(prefix)!r}")
    if any(c in prefix for c in "?#* \\"):
        raise OptionError(f"{where}: prefix is a literal path, not a pattern; write it without '?', '#', '*' or spaces")
    if not prefix.isascii():
        raise OptionError(f"{where}: prefix is not as a client sends it; write {quote(prefix, safe=_SAFE)!r}")
    if not (isinstance(handler_class, type) and issubclass(handler_class, ProxyHandler)):
        raise OptionError(f"{where}: {handler_class!r} is not a subclass of ProxyHandler; pass options by keyword")
    checked = ProxyOptions.parse(where, {"upstream": upstream, **options})
    literal = prefix.rstrip("/")
    return Rule(PrefixMatches(literal), handler_class, {"mounted": Mounted(checked, literal)}, name=name)
