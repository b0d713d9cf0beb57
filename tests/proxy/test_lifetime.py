"""What is over is let go: exchanges by the handles that served them, clients by the loops that are gone."""

import asyncio
import gc
import socket
from pathlib import Path

import pytest
from tornado.httputil import HTTPHeaders

from tests.support.wire import until
from tornado_proxy.clients import close_clients, shared_client
from tornado_proxy.clients.curl.transfer import CurlTransfer
from tornado_proxy.messages import UpstreamRequest, UpstreamResponse


class TestWhatIsOver:
    """A handle that waits for its next request keeps nothing of the last one."""

    @pytest.mark.parametrize("mode", ["stream", "buffer"])
    async def test_bodies_are_let_go(self, proxy, echo, mode):
        def replace(handler, request):
            request.body = b"a new body"

        def present() -> list[object]:
            gc.collect()
            objects = gc.get_objects()
            # What reads a body of bytes has a view of it; our server has one too, of the buffer that it reads into.
            views = [thing for thing in objects if type(thing) is memoryview and type(thing.obj) is bytes]
            ours = (CurlTransfer, UpstreamRequest, UpstreamResponse)
            return views + [thing for thing in objects if type(thing) in ours]

        running = await proxy(echo.url, rewrite_request=replace, response_mode=mode)
        # Other tests', in this process, which were cut off in the middle.
        others = present()
        assert (await running.request("POST", "/x", body=b"some body")).status == 200
        await running.next_outcome()

        await until(lambda: len(present()) <= len(others), "nothing was left of the exchange")


class TestLoopsThatWereClosed:
    """One process may run an application again and again, each time on a new loop, as test suites do."""

    @pytest.mark.parametrize("pending", [False, True], ids=["idle", "in the middle of an exchange"])
    def test_their_clients_are_closed_once_another_loop_needs_one(self, pending):
        listeners = []

        async def use() -> None:
            listener = socket.create_server(("127.0.0.1", 0))
            listeners.append(listener)
            listener.setblocking(False)
            client = shared_client("curl", {})
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            sending = asyncio.ensure_future(client.send(UpstreamRequest("GET", url, HTTPHeaders(), None, None)))  # type: ignore[arg-type]
            loop = asyncio.get_running_loop()
            sock, _ = await loop.sock_accept(listener)
            listeners.append(sock)
            await loop.sock_recv(sock, 1000)
            await loop.sock_sendall(sock, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n" + (b"" if pending else b"x"))
            response = await sending
            if not pending:
                await response.read()

        counts = []
        try:
            for _ in range(5):
                asyncio.run(use())
                while listeners:
                    listeners.pop().close()
                gc.collect()
                counts.append(len(list(Path("/proc/self/fd").iterdir())))
        finally:
            asyncio.run(let_go())
        assert counts[1] == counts[-1]


async def let_go() -> None:
    shared_client("curl", {})
    close_clients()
