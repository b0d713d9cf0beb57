"""The ``websockets`` library on both sides: whatever it does directly, it does through the proxy too."""

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest

websockets = pytest.importorskip("websockets", reason="websockets is not installed")

from websockets.asyncio.client import connect  # noqa: E402
from websockets.asyncio.server import serve  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

MIB = 1024 * 1024


async def echo(server):
    async for message in server:
        await server.send(message)


@pytest.fixture
async def through(proxy):
    """Return a function: a server with `handler`, a proxy in front of it, and a connection through both."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(handler=echo, *, client=None, count=1, **options):
            server = await stack.enter_async_context(serve(handler, "127.0.0.1", 0, max_size=None, **options))
            port = server.sockets[0].getsockname()[1]
            running = await proxy(f"ws://127.0.0.1:{port}/up", prefix="/app")
            url = f"ws://127.0.0.1:{running.port}/app/chat"
            clients = [connect(url, max_size=None, **(client or {})) for _ in range(count)]
            connections = await asyncio.gather(*(stack.enter_async_context(each) for each in clients))
            return running, connections

        yield start


class TestMessages:
    @pytest.mark.parametrize("message", ["hello", "", "h\u00e9llo \U0001f30d", b"", b"\x00\xff"])
    async def test_come_back_as_they_went(self, through, message):
        _, [connection] = await through()
        await connection.send(message)
        assert await connection.recv() == message

    @pytest.mark.parametrize("compression", [None, "deflate"])
    async def test_of_16_mib_do_too(self, through, compression):
        _, [connection] = await through(client={"compression": compression})
        message = os.urandom(16 * MIB)
        await connection.send(message)
        assert await connection.recv() == message

    async def test_in_fragments_stay_in_fragments(self, through):
        fragments = []

        async def collect(server):
            fragments.extend([fragment async for fragment in server.recv_streaming()])
            await server.send("done")

        _, [connection] = await through(collect)
        await connection.send(["one", "two", "three"])
        assert await connection.recv() == "done"
        assert [fragment for fragment in fragments if fragment] == ["one", "two", "three"]

    async def test_of_200_connections_at_once_find_their_way(self, through):
        running, connections = await through(count=200)

        async def talk(number, connection):
            for turn in range(3):
                await connection.send(f"{number} {turn}")
                assert await connection.recv() == f"{number} {turn}"
            await connection.close()

        await asyncio.gather(*(talk(number, connection) for number, connection in enumerate(connections)))
        outcomes = [await running.next_outcome() for _ in connections]
        assert {(outcome.status, outcome.error) for outcome in outcomes} == {(101, None)}


class TestTheHandshake:
    async def test_chooses_the_second_of_two_subprotocols(self, through):
        _, [connection] = await through(subprotocols=["b"], client={"subprotocols": ["a", "b"]})
        assert connection.subprotocol == "b"

    async def test_negotiates_compression_end_to_end(self, through):
        servers = []

        async def remember(server):
            servers.append(server)
            await echo(server)

        running, [connection] = await through(remember)
        assert "permessage-deflate" in connection.response.headers["Sec-WebSocket-Extensions"]
        message = "a" * MIB
        await connection.send(message)
        assert await connection.recv() == message
        assert "permessage-deflate" in servers[0].request.headers["Sec-WebSocket-Extensions"]
        assert servers[0].request.path == "/up/chat"
        await connection.close()
        # What passed was compressed, so nobody in between has looked inside.
        assert (await running.next_outcome()).bytes_up < MIB / 10

    async def test_that_the_server_refuses_shows_its_answer(self, through):
        async def refuse(connection, request):
            response = connection.respond(403, "not you\n")
            response.headers["X-Why"] = "because"
            return response

        with pytest.raises(InvalidStatus) as caught:
            await through(process_request=refuse)
        response = caught.value.response
        assert (response.status_code, response.body, response.headers["X-Why"]) == (403, b"not you\n", "because")

    async def test_that_is_no_websocket_gets_the_servers_own_answer(self, proxy):
        async with serve(echo, "127.0.0.1", 0) as server:
            running = await proxy(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            assert (await running.get("/")).status == 426


class TestControlFrames:
    async def test_close_code_and_reason_reach_the_client(self, through):
        """UP-03."""

        async def leave(server):
            await server.close(4001, "enough")

        _, [connection] = await through(leave)
        with pytest.raises(ConnectionClosed):
            await connection.recv()
        assert (connection.close_code, connection.close_reason) == (4001, "enough")

    async def test_close_code_and_reason_reach_the_server(self, through):
        closed = asyncio.get_running_loop().create_future()

        async def wait(server):
            await server.wait_closed()
            closed.set_result((server.close_code, server.close_reason))

        _, [connection] = await through(wait)
        await connection.close(4002, "bye")
        assert await closed == (4002, "bye")
        assert connection.close_code == 4002

    async def test_a_ping_of_the_client_is_answered(self, through):
        _, [connection] = await through()
        assert await (await connection.ping(b"data")) < 5

    async def test_a_ping_of_the_server_is_answered(self, through):
        async def ping(server):
            await (await server.ping(b"data"))
            await server.send("answered")

        _, [connection] = await through(ping)
        assert await connection.recv() == "answered"
