"""One attempt of an exchange: what is sent, steps (3) and (4), and whether there may be another, step (5)."""

from __future__ import annotations

from tornado_proxy.downstream import Downstream, awaited
from tornado_proxy.errors import BadRequest, ConnectTimeout, HookError, Retry, UpstreamError
from tornado_proxy.flow import BodyPipe
from tornado_proxy.headers import lines_of, remove_range
from tornado_proxy.heads import check_rewritten, takes_trailers, upstream_headers
from tornado_proxy.inbound import Inbound
from tornado_proxy.messages import UpstreamRequest
from tornado_proxy.options import ProxyOptions
from tornado_proxy.upload import Upload
from tornado_proxy.urls import UpstreamURL, escapes_base, join_url, whole_server

# What may be repeated although the upstream may have read it: the safe methods (RFC 9110 section 9.2.1). PUT and DELETE
# are idempotent too, but only in the eyes of who sends them: others may have acted in between.
_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


def build_request(
    downstream: Downstream,
    options: ProxyOptions,
    inbound: Inbound,
    upload: Upload | None,
    upstream: UpstreamURL,
    te: bool,
) -> UpstreamRequest:
    """Step (3): return what we shall send to ``upstream``. Raises ``BadRequest`` for a target that leaves its base.

    ``te`` is whether the client can ask for trailers.
    """
    source, target = downstream.request, inbound.target
    if escapes_base(upstream.path, inbound.tail):
        raise BadRequest("request target leaves the upstream's base path")
    assert source.method is not None
    headers = upstream_headers(options, inbound, source)
    if "Range" in lines_of(headers) and downstream.hooked("filter_response_body"):
        # The filter needs all of it, and ranges of what it makes are not those of the upstream's body.
        remove_range(headers)
    if te and takes_trailers(source):
        headers["Te"] = "trailers"
    return UpstreamRequest(
        source.method,
        whole_server(upstream) if target.path == "*" else join_url(upstream, inbound.tail, target.query),
        headers,
        upload.pipe if upload is not None else inbound.body,
        source,
        connect_timeout=options.connect_timeout,
        buffer_size=options.buffer_size,
        expect_continue=inbound.expects_continue and not (upload is not None and upload.received),
        timed=downstream.timed,
        upgrade=inbound.upgrade,
    )


def check_request(
    request: UpstreamRequest, downstream: Downstream, options: ProxyOptions, upload: Upload | None
) -> None:
    """Step (4): take the user's last word on ``request``, where it can be sent. Raises ``HookError``."""
    if upload is not None:
        if request.body is upload.pipe:
            upload.goes_with(request)
        else:
            # Replaced: what still arrives has nowhere to go.
            upload.pipe.discard()
    if not isinstance(request.body, BodyPipe):
        request.expect_continue = False
    if request.body is not None and not isinstance(request.body, bytes | BodyPipe):
        raise HookError(f"rewrite_request set the body to {type(request.body).__name__}; assign bytes or None")
    if request.method != "GET" or request.body is not None:
        # No handshake any more (RFC 6455 section 4.1).
        request.upgrade = False
    if options.normalize_headers or downstream.hooked("rewrite_request"):
        check_rewritten(request)


async def may_retry(
    request: UpstreamRequest, error: UpstreamError, downstream: Downstream, options: ProxyOptions, attempts: int
) -> bool:
    """Whether another attempt than these cannot make the upstream act twice (RFC 9110 section 9.2.2)."""
    if attempts > options.retries or error.retry is Retry.NEVER:
        return False
    if isinstance(request.body, BodyPipe) and request.body.consumed:
        return False
    if error.retry is Retry.IF_IDEMPOTENT and request.method not in _REPEATABLE:
        return False
    if isinstance(error, ConnectTimeout) and isinstance(options.upstream, str):
        # The same address would take as long again.
        return False
    allowed = await awaited(downstream.hooks.should_retry(error))
    return allowed is None or bool(allowed)
