"""What is seen of upstream connections that are kept for later, on real sockets."""

import asyncio
import os
import socket

import pycurl
import pytest

from tests.support.wire import until
from tornado_proxy.clients.curl.sockets import SocketWatch


@pytest.fixture
async def connection():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as ours:
        theirs, _ = listener.accept()
        with theirs:
            yield ours, theirs


@pytest.fixture
async def watch():
    def look():
        for socket_and_action in watch.ready():
            watch.seen.put_nowait(socket_and_action)

    watch = SocketWatch(asyncio.get_running_loop(), look)
    watch.seen = asyncio.Queue()
    yield watch
    watch.close()


async def next_turn():
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def address(sock):
    """Return how the watch knows this connection: by its own port and the other end's address."""
    return sock.getsockname()[1], sock.getpeername()


class TestIdleSockets:
    async def test_what_comes_on_a_new_one_is_no_noise(self, connection, watch):
        """TLS 1.3 sends session tickets right after the handshake (RFC 8446 section 4.6.1)."""
        ours, theirs = connection
        theirs.send(b"tickets")
        watch.watch(ours.fileno(), readable=True, writable=False)
        assert watch.is_quiet(*address(ours))

    async def test_one_that_was_only_written_to_is_quiet(self, connection, watch):
        ours, _ = connection
        known = address(ours)
        watch.watch(ours.fileno(), readable=False, writable=True)
        assert await watch.seen.get() == (ours.fileno(), pycurl.CSELECT_OUT)
        watch.unwatch(ours.fileno())
        await next_turn()
        assert watch.is_quiet(*known)

    @pytest.mark.parametrize("sign", [b"unasked", b""])
    async def test_bytes_and_the_end_are_noticed_at_once(self, connection, watch, sign):
        ours, theirs = connection
        known = address(ours)
        watch.watch(ours.fileno(), readable=True, writable=False)
        watch.unwatch(ours.fileno())
        assert watch.is_quiet(*known)
        theirs.send(sign) if sign else theirs.shutdown(socket.SHUT_WR)
        # In a turn of its own; the loop has not looked yet.
        await next_turn()
        assert not watch.is_quiet(*known)
        await next_turn()
        assert not watch.is_quiet(*known)
        assert watch.seen.empty()

    async def test_what_was_read_in_this_turn_makes_no_noise(self, connection, watch):
        ours, theirs = connection
        known = address(ours)
        watch.watch(ours.fileno(), readable=True, writable=False)
        assert watch.is_quiet(*known)
        theirs.send(b"answer")
        await next_turn()
        watch.seen.get_nowait()
        assert not watch.is_quiet(*known)
        assert ours.recv(100) == b"answer"
        watch.unwatch(ours.fileno())
        assert watch.is_quiet(*known)

    async def test_a_descriptor_that_is_used_again_begins_anew(self, connection, watch):
        ours, theirs = connection
        watch.watch(ours.fileno(), readable=True, writable=False)
        watch.unwatch(ours.fileno())
        assert watch.is_quiet(*address(ours))
        theirs.send(b"unasked")
        await next_turn()
        assert not watch.is_quiet(*address(ours))
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname()) as new,
        ):
            os.dup2(new.fileno(), ours.fileno())
            watch.watch(ours.fileno(), readable=True, writable=False)
            watch.unwatch(ours.fileno())
            assert watch.is_quiet(*address(ours))
            assert watch.is_quiet(*address(ours))

    async def test_one_whose_transfer_was_paused_is_not_new(self, connection, watch):
        """libcurl asks for nothing while it is paused; what comes then is no noise, and what comes later is."""
        ours, theirs = connection
        watch.watch(ours.fileno(), readable=True, writable=False)
        assert watch.is_quiet(*address(ours))
        watch.unwatch(ours.fileno())
        theirs.send(b"more")
        await until(lambda: watch._noisy, "the loop has looked")
        watch.watch(ours.fileno(), readable=True, writable=False)
        assert await watch.seen.get() == (ours.fileno(), pycurl.CSELECT_IN)
        assert ours.recv(4) == b"more"
        watch.unwatch(ours.fileno())
        await next_turn()
        theirs.send(b"unasked")
        await next_turn()
        assert not watch.is_quiet(*address(ours))


@pytest.fixture
def pair():
    """Make connections from one and the same local port, each to a listener of its own; ours first."""
    made = []

    def connect(port):
        listener = socket.create_server(("127.0.0.1", 0))
        ours = socket.socket()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ours.bind(("127.0.0.1", port))
        ours.connect(listener.getsockname())
        theirs, _ = listener.accept()
        made.extend((listener, ours, theirs))
        return ours, theirs

    yield connect
    for sock in made:
        sock.close()


class TestOneLocalPort:
    """The kernel gives a local port to several connections, if they go to different addresses."""

    def used(self, watch, sock):
        watch.watch(sock.fileno(), readable=True, writable=False)
        watch.unwatch(sock.fileno())
        assert watch.is_quiet(*address(sock))

    async def test_the_noise_on_one_is_not_the_others(self, pair, watch):
        one, _ = pair(0)
        other, theirs = pair(one.getsockname()[1])
        self.used(watch, one)
        self.used(watch, other)
        theirs.send(b"unasked")
        await next_turn()
        assert not watch.is_quiet(*address(other))
        assert watch.is_quiet(*address(one))

    async def test_the_first_is_still_known_when_the_second_has_gone(self, pair, watch):
        one, theirs = pair(0)
        other, _ = pair(one.getsockname()[1])
        self.used(watch, one)
        self.used(watch, other)
        # Its descriptor is used again, for a connection from another port.
        new, _ = pair(0)
        os.dup2(new.fileno(), other.fileno())
        self.used(watch, other)
        theirs.send(b"unasked")
        await next_turn()
        assert not watch.is_quiet(*address(one))

    async def test_the_second_is_still_known_when_the_firsts_descriptor_leads_to_its_upstream(self, pair, watch):
        one, _ = pair(0)
        other, theirs = pair(one.getsockname()[1])
        self.used(watch, one)
        self.used(watch, other)
        with socket.create_connection(other.getpeername()) as foreign:
            os.dup2(foreign.fileno(), one.fileno())
            theirs.send(b"unasked")
            await next_turn()
            assert not watch.is_quiet(*address(other))


class TestSharedConnections:
    """HTTP/2: what waits on a connection may be for any of its streams, and says for which."""

    async def test_one_that_carries_several_exchanges_is_quiet(self, connection, watch):
        ours, theirs = connection
        watch.watch(ours.fileno(), readable=True, writable=False)
        watch.unwatch(ours.fileno())
        assert watch.is_quiet(*address(ours))
        watch.share(*address(ours), "http://upstream")
        theirs.send(b"a frame")
        await next_turn()
        assert watch.is_quiet(*address(ours))

    async def test_one_that_is_no_good_is_gone_when_its_descriptor_is_a_unix_sockets(self, connection, watch):
        ours, _ = connection
        watch.watch(ours.fileno(), readable=True, writable=False)
        watch.unwatch(ours.fileno())
        watch.condemn(*address(ours), "http://upstream")
        assert watch.has_dead("http://upstream")
        one, other = socket.socketpair()
        with one, other:
            os.dup2(one.fileno(), ours.fileno())
            assert not watch.has_dead("http://upstream")
