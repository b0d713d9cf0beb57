"""What is seen of upstream connections that are kept for later, on real sockets."""

import asyncio
import os
import socket

import pytest

from tornado_proxy.clients.curl.sockets import SocketWatch


@pytest.fixture
async def connection():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as ours:
        theirs, _ = listener.accept()
        with theirs:
            yield ours, theirs


@pytest.fixture
async def watch():
    ready = asyncio.Queue()
    watch = SocketWatch(asyncio.get_running_loop(), lambda *event: ready.put_nowait(event))
    watch.ready = ready
    yield watch
    watch.close()


async def next_turn():
    await asyncio.sleep(0)
    await asyncio.sleep(0)


class TestIdleSockets:
    async def test_what_comes_on_a_new_one_is_no_noise(self, connection, watch):
        """TLS 1.3 sends session tickets right after the handshake (RFC 8446 section 4.6.1)."""
        ours, theirs = connection
        theirs.send(b"tickets")
        watch.watch(ours.fileno(), readable=True, writable=False)
        assert watch.is_quiet(ours.getsockname()[1])

    async def test_one_that_was_only_written_to_is_quiet(self, connection, watch):
        ours, _ = connection
        port = ours.getsockname()[1]
        watch.watch(ours.fileno(), readable=False, writable=True)
        assert await watch.ready.get() == (ours.fileno(), False, True)
        watch.unwatch(ours.fileno())
        await next_turn()
        assert watch.is_quiet(port)

    @pytest.mark.parametrize("sign", [b"unasked", b""])
    async def test_bytes_and_the_end_are_noticed_at_once(self, connection, watch, sign):
        ours, theirs = connection
        port = ours.getsockname()[1]
        watch.watch(ours.fileno(), readable=True, writable=False)
        watch.unwatch(ours.fileno())
        assert watch.is_quiet(port)
        theirs.send(sign) if sign else theirs.shutdown(socket.SHUT_WR)
        # In a turn of its own; the loop has not looked yet.
        await next_turn()
        assert not watch.is_quiet(port)
        await next_turn()
        assert not watch.is_quiet(port)
        assert watch.ready.empty()

    async def test_what_was_read_in_this_turn_makes_no_noise(self, connection, watch):
        ours, theirs = connection
        port = ours.getsockname()[1]
        watch.watch(ours.fileno(), readable=True, writable=False)
        assert watch.is_quiet(port)
        theirs.send(b"answer")
        await next_turn()
        watch.ready.get_nowait()
        assert not watch.is_quiet(port)
        assert ours.recv(100) == b"answer"
        watch.unwatch(ours.fileno())
        assert watch.is_quiet(port)

    async def test_a_descriptor_that_is_used_again_begins_anew(self, connection, watch):
        ours, theirs = connection
        watch.watch(ours.fileno(), readable=True, writable=False)
        watch.unwatch(ours.fileno())
        assert watch.is_quiet(ours.getsockname()[1])
        theirs.send(b"unasked")
        await next_turn()
        assert not watch.is_quiet(ours.getsockname()[1])
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname()) as new,
        ):
            os.dup2(new.fileno(), ours.fileno())
            watch.watch(ours.fileno(), readable=True, writable=False)
            watch.unwatch(ours.fileno())
            assert watch.is_quiet(ours.getsockname()[1])
            assert watch.is_quiet(ours.getsockname()[1])
