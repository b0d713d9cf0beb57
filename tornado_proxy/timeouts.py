"""The time limits of an exchange, kept by one timer.

Which limit applies follows from whom the exchange is waiting for, so that nobody is blamed for another's slowness:

1. writing downstream is blocked: ``write_timeout`` without progress; the upstream, which we hold back, is not timed.
2. there is no connection yet: nothing here, the client keeps ``connect_timeout``.
3. the request is not sent yet: ``idle_timeout`` without a byte; the side that keeps us waiting is at fault.
4. the request is sent, no head yet: ``response_timeout`` from the last byte sent.
5. the body is coming: ``idle_timeout`` without a byte either way.

``total_timeout`` applies always. Times are those of ``time.monotonic()``: a clock that is set does not matter.

Most exchanges are over in milliseconds, long before any limit. So the watchdogs of one loop share a timer at first,
and each gets one of its own only if it is still there when that fires, a tenth of a second later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from tornado_proxy.decoded import DecodedStream
from tornado_proxy.errors import DownstreamClosed, DownstreamTimeout, HookError, Phase, ProxyError, UpstreamTimeout
from tornado_proxy.flow import BodyPipe
from tornado_proxy.messages import UpstreamResponse
from tornado_proxy.options import ProxyOptions

# Seconds between looks at a downstream that we do not read from because the upstream does not take its body: while
# nobody reads, nobody is told that the other end has gone.
_LOOK = 0.5

# Turns of the loop that a limit which seems to have passed is given: for the bytes to be read, the future to be
# resolved and the exchange to see it.
_SECOND_LOOKS = 3

# Seconds that a watchdog shares a timer at most; a limit below that is kept that much too late.
_SHARING = 0.1


class _SharedTimer:
    """The timer of those watchdogs of one loop that have none of their own yet."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.watchdogs: set[Watchdog] = set()
        self._looking = False

    def take(self, watchdog: Watchdog) -> None:
        self.watchdogs.add(watchdog)
        if not self._looking:
            self._looking = True
            self.loop.call_later(_SHARING, self._look)

    def _look(self) -> None:
        self._looking = False
        lasting, self.watchdogs = self.watchdogs, set()
        for watchdog in lasting:
            watchdog.take_own_timer()


# That of the loop that asked last; another loop begins one of its own, and the old one ends with its last look.
_shared_timer: _SharedTimer | None = None


def _nobody(error: ProxyError) -> None:
    """Stand for the exchange once it is over."""


def _nothing() -> int:
    return 0


def _nowhere() -> bool:
    return False


class Watchdog:
    """Calls ``on_timeout(error)``, once, when the exchange has waited too long. Owned and stopped by the exchange."""

    __slots__ = (
        "_blocked_since",
        "_connecting",
        "_due",
        "_has_left",
        "_has_own_timer",
        "_last_unsent",
        "_looks",
        "_loop",
        "_on_timeout",
        "_options",
        "_sent_at",
        "_shared",
        "_started",
        "_stopped",
        "_timer",
        "_unsent",
        "response",
        "sending",
        "upload",
        "upstream",
    )

    def __init__(
        self,
        options: ProxyOptions,
        on_timeout: Callable[[ProxyError], None],
        unsent: Callable[[], int],
        has_left: Callable[[], bool],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._options = options
        self._on_timeout = on_timeout
        # Bytes that wait to be written downstream, and whether the downstream has closed; asked only when it matters.
        self._unsent = unsent
        self._has_left = has_left
        self._loop = loop
        self._started = monotonic()
        self._timer: asyncio.TimerHandle | None = None
        # When it fires. Not asked of the timer: uvloop's have no when() if the time has come already.
        self._due = 0.0
        # The timer that it shares at first, None before that; and whether it has its own by now.
        self._shared: _SharedTimer | None = None
        self._has_own_timer = False
        self._stopped = False
        # Looks at a limit that seems to have passed; see _look.
        self._looks = 0
        # What is waited for; the exchange sets these.
        self.upload: BodyPipe | None = None
        self.response: UpstreamResponse | None = None
        self.upstream: str | None = None
        self.sending = False
        self._connecting = False
        self._sent_at = self._started
        # Blocked writing downstream since then; None while not.
        self._blocked_since: float | None = None
        self._last_unsent = 0
        if options.total_timeout is not None:
            # The others begin with the request.
            self._share_timer()

    def request_started(self, upload: BodyPipe | None, upstream: str, *, connecting: bool = False) -> None:
        """An attempt begins: time its sending and its head; if ``connecting``, from :meth:`sending_began` on."""
        self.upload = upload
        self.upstream = upstream
        self.sending = True
        self._connecting = connecting
        self._sent_at = monotonic()
        if self._shared is None:
            self._share_timer()
        elif self._has_own_timer:
            self._arm()

    def request_failed(self) -> None:
        """The attempt is over. Until the next, hooks are waited for, which have no limit but ``total_timeout``."""
        self.sending = False

    def sending_began(self) -> None:
        """There is a connection, and the request goes out on it."""
        self._connecting = False
        self._sent_at = monotonic()
        if self._has_own_timer:
            self._arm()

    def upload_blocked(self) -> None:
        """The upstream does not take the body as fast as it comes, so nobody reads from the downstream."""
        if self._has_own_timer:
            self._arm()

    def upload_ended(self) -> None:
        """The downstream has sent all of its body; what is held goes on its way."""
        if self._has_own_timer:
            self._arm()

    def head_received(self, response: UpstreamResponse) -> None:
        self.response = response
        if self._has_own_timer:
            self._arm()

    def write_blocked(self) -> None:
        self._blocked_since = monotonic()
        self._last_unsent = self._unsent()
        if self._has_own_timer:
            self._arm()

    def write_drained(self) -> None:
        """Forget the blocked write. The timer stays: it looks again when it fires, which is cheaper than moving it."""
        self._blocked_since = None
        self._sent_at = monotonic()
        if self._has_own_timer and self._timer is None:
            # It has fired while nothing was timed: there is no write_timeout.
            self._arm()

    def take_own_timer(self) -> None:
        """Keep time by a timer of its own from now on."""
        self._has_own_timer = True
        self._arm()

    def stop(self) -> None:
        """Look no more, and let go of the exchange: the two would wait for the garbage collector together."""
        self._stopped = True
        self._on_timeout, self._unsent, self._has_left = _nobody, _nothing, _nowhere
        self.response = self.upload = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif self._shared is not None:
            self._shared.watchdogs.discard(self)

    def _share_timer(self) -> None:
        global _shared_timer
        # Read once: loops of other threads have nurseries too.
        shared = _shared_timer
        if shared is None or shared.loop is not self._loop:
            shared = _shared_timer = _SharedTimer(self._loop)
        self._shared = shared
        shared.take(self)

    def _arm(self) -> None:
        if self._stopped:
            return
        deadline = self._deadline()
        if deadline is None:
            return
        if self._timer is None or self._due > deadline[0]:
            if self._timer is not None:
                self._timer.cancel()
            self._look_at(deadline[0])

    def _look(self) -> None:
        self._timer = None
        now = monotonic()
        upload = self.upload
        if upload is not None and not upload.ended and upload.held and self._has_left():
            self._on_timeout(DownstreamClosed("downstream closed in the middle of its body", phase=Phase.SEND))
            return
        deadline = self._deadline()
        if deadline is None:
            return
        when, error = deadline
        if when <= now and error is not None:
            if self._looks < _SECOND_LOOKS:
                # Where something has held up the loop, what we wait for may be here and its turn just after ours.
                self._looks += 1
                self._look_at(now)
                return
            self._on_timeout(error())
            return
        self._looks = 0
        self._look_at(max(when, now + 0.001))

    def _look_at(self, when: float) -> None:
        self._due = when
        # Not call_at: whose clock a loop keeps is its own business.
        self._timer = self._loop.call_later(max(when - monotonic(), 0.0), self._look)

    def _deadline(self) -> tuple[float, Callable[[], ProxyError] | None] | None:
        """Return when to look again, and the error if nothing has changed by then."""
        found = self._waiting_deadline()
        total = self._options.total_timeout
        if total is not None and (found is None or found[0] > self._started + total):
            what = f"exchange took more than {total:g} s"
            phase = Phase.HEAD if self.response is None else Phase.BODY
            # Until a request was sent, we wait for hooks only.
            error = self._upstream_error(what, phase) if self.sending else lambda: HookError(what)
            found = self._started + total, error
        return found

    def _waiting_deadline(self) -> tuple[float, Callable[[], ProxyError] | None] | None:
        options = self._options
        if self._blocked_since is not None:
            return self._blocked_deadline(options.write_timeout)
        if self.response is None:
            upload = self.upload
            if self._connecting or not self.sending:
                # Nobody would tell us that a downstream has left which we do not read from.
                return (monotonic() + _LOOK, None) if upload is not None and upload.held else None
            if upload is not None and not (upload.ended and not upload.held):
                return self._upload_deadline(upload)
            if options.response_timeout is None:
                return None
            since = self._sent_at if upload is None else max(self._sent_at, upload.last_read)
            return since + options.response_timeout, self._upstream_error(
                f"no answer within {options.response_timeout:g} s", Phase.HEAD
            )
        stream = self.response.stream
        return self._body_deadline(stream.source if isinstance(stream, DecodedStream) else stream)

    def _blocked_deadline(self, limit: float | None) -> tuple[float, Callable[[], ProxyError]] | None:
        if limit is None:
            return None
        unsent = self._unsent()
        if unsent != self._last_unsent:
            self._last_unsent = unsent
            self._blocked_since = monotonic()
        assert self._blocked_since is not None
        return self._blocked_since + limit, lambda: DownstreamTimeout(
            f"downstream took no byte for {limit:g} s", phase=Phase.BODY
        )

    def _upload_deadline(self, upload: BodyPipe) -> tuple[float, Callable[[], ProxyError] | None] | None:
        limit = self._options.idle_timeout
        # What the client has read, and does not ask beyond, the upstream has not taken either.
        stalled = upload.held > 0
        look = monotonic() + _LOOK
        if limit is None:
            return (look, None) if stalled else None
        when = max(self._sent_at, upload.last_write, upload.last_read) + limit
        if not stalled:
            return when, lambda: DownstreamTimeout(f"downstream sent no byte for {limit:g} s", phase=Phase.SEND)
        if look < when:
            return look, None
        return when, self._upstream_error(f"upstream took no byte for {limit:g} s", Phase.SEND)

    def _body_deadline(self, stream: BodyPipe) -> tuple[float, Callable[[], ProxyError] | None] | None:
        limit = self._options.idle_timeout
        if limit is None:
            return None
        if stream.held >= stream.limit or stream.ended:
            # We hold the upstream back, or it is done: its silence is ours.
            return monotonic() + limit, None
        last = max(self._sent_at, stream.last_write)
        if self.upload is not None:
            last = max(last, self.upload.last_write, self.upload.last_read)
        return last + limit, self._upstream_error(f"no byte either way for {limit:g} s", Phase.BODY)

    def _upstream_error(self, what: str, phase: Phase) -> Callable[[], ProxyError]:
        return lambda: UpstreamTimeout(f"upstream {self.upstream}: {what}", phase=phase, upstream=self.upstream)
