"""The contract, kept by CurlClient."""

import asyncio
import gc
import socket

import pytest
from tornado.httputil import HTTPHeaders

from tests.clients.contract import begun
from tests.clients.support import PIECE, collected, filling, request_for, until_it_waits
from tests.clients.wire_contract import Contract
from tests.support.flooding import shrink
from tests.support.wire import within
from tornado_proxy.clients.curl import CurlClient
from tornado_proxy.clients.curl.transfer import CurlTransfer
from tornado_proxy.flow import BodyPipe

MIB = 1024 * 1024


class TestCurl(Contract):
    client_class = CurlClient

    async def test_an_idle_handle_holds_nothing_of_its_last_request(self, client, upstream):
        """Nor its trailers: what libcurl may call is called by the handle, for as long as nobody needs it."""
        pipe = BodyPipe(1024)
        pipe.write(b"hello")
        pipe.trailers = HTTPHeaders({"X-A": "1"})
        pipe.close()
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        conn, _ = await upstream.request()
        await conn.respond(200)
        assert await within(collected(await within(sending, "the response")), "the body") == (b"", None)
        del pipe, sending
        await asyncio.sleep(0)
        gc.collect()
        assert [each for each in gc.get_objects() if isinstance(each, CurlTransfer)] == []

    @pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="this system has no TCP_NOTSENT_LOWAT")
    async def test_the_kernel_takes_little_for_an_upstream_that_does_not_read(self, client, upstream):
        pipe = BodyPipe(64 * 1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        conn = await upstream.accept()
        shrink(conn.sock)
        await conn.read_head()
        assert await until_it_waits(filling(pipe)) < 2 * MIB
        sending.cancel()

    async def test_one_that_is_closed_says_so_at_once(self, client):
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await within(client.send(request_for("GET", "http://127.0.0.1:1/")), "the refusal")

    async def test_who_reads_as_fast_as_bytes_come_leaves_others_their_turns(self, client, upstream):
        conn, response = await begun(client, upstream, request_for("GET", upstream.url))

        async def step() -> int:
            await conn.send_chunk(PIECE)
            return len(PIECE)

        # All of it waits in the kernel's buffers, so that nobody need wait for it.
        there = await until_it_waits(step)
        turns, loop = 0, asyncio.get_running_loop()

        def turn() -> None:
            nonlocal turns
            turns += 1
            if not response.stream.ended:
                loop.call_soon(turn)

        turn()
        taken = 0
        while taken < there:
            taken += len(await response.stream.read())
        assert turns > taken / (2 * MIB)
        response.abort()
