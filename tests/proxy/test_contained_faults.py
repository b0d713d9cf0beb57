"""A fault stays where it is: one exchange fails visibly, the next and all others go on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path
from time import monotonic

import pytest
from tornado.httputil import HTTPHeaders

from tests.proxy.test_cancel import CHUNKED, PIECE
from tests.support.downstream import Downstream
from tests.support.process import StandaloneProxy, free_port
from tests.support.upstream import EchoUpstream
from tests.support.wire import LAST_CHUNK, chunk, until, within
from tornado_proxy import ProxyHandler, draining
from tornado_proxy.clients.curl import CurlClient
from tornado_proxy.clients.curl.transfer import CurlTransfer
from tornado_proxy.errors import HookError
from tornado_proxy.flow import BodyPipe
from tornado_proxy.messages import UpstreamRequest
from tornado_proxy.options import ProxyOptions
from tornado_proxy.timeouts import Watchdog

MODES = pytest.mark.parametrize("mode", ["stream", "buffer"])

# Hook -> what the downstream sees when it raises: a status, or None for an answer that is visibly cut.
RAISING = {
    "choose_upstream": 500,
    "rewrite_request": 500,
    "filter_request_body": 500,
    "handle_status": 500,
    "rewrite_response": 500,
    "filter_response_body": None,
    "on_done": 200,
}


def raising(hook: str, asynchronous: bool) -> type[ProxyHandler]:
    """Return a handler whose `hook` raises for /raise."""

    class Raising(ProxyHandler):
        pass

    def fails(self, *arguments):
        if self.request.path == "/raise":
            raise RuntimeError("a hook's own fault")
        return getattr(ProxyHandler, hook)(self, *arguments)

    async def fails_later(self, *arguments):
        await asyncio.sleep(0)
        return fails(self, *arguments)

    setattr(Raising, hook, fails_later if asynchronous else fails)
    return Raising


class TestAHookThatRaises:
    """FA-22: a 500, or a visible cut where the head is out; the connection's next request is served."""

    @MODES
    @pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
    @pytest.mark.parametrize("hook", RAISING)
    async def test_the_next_request_is_served(self, proxy, echo, expect_log, hook, asynchronous, mode):
        expect_log("a hook's own fault")
        running = await proxy(echo.url, raising(hook, asynchronous), response_mode=mode)
        downstream = await running.connect()
        for _ in range(3):
            response = await downstream.exchange("POST", "/raise", body=b"some body")
            status = RAISING[hook]
            if status is None and response.complete:
                # In buffer mode, and where the first chunk comes with the head, nothing was sent before.
                status = 500
            if status is None:
                assert (response.status, response.complete) == (200, False)
                downstream = await running.connect()
            else:
                assert (response.status, response.complete) == (status, True)
            good = await downstream.exchange("POST", "/good", body=b"some body")
            assert (good.status, good.complete) == (200, True)
        await until(lambda: draining.active_exchanges() == 0, "no exchange was left")

    async def test_in_the_middle_of_a_response_it_is_a_visible_cut(self, proxy, upstream, expect_log):
        expect_log("a hook's own fault")

        def filter_second(handler, data):
            if data == b"two":
                raise RuntimeError("a hook's own fault")
            return data

        running = await proxy(upstream.url, filter_response_body=filter_second)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        await downstream.read_head()
        assert await downstream.read_body(3) == b"one"
        await conn.send_chunk(b"two")
        await downstream.closed()
        assert await downstream.read_until_closed() == b""
        await conn.closed()
        assert (await running.next_outcome()).side == "proxy"

    async def test_should_retry(self, proxy, expect_log):
        expect_log("a hook's own fault")

        def fails(handler, error):
            raise RuntimeError("a hook's own fault")

        running = await proxy(f"http://127.0.0.1:{free_port()}", should_retry=fails)
        assert (await running.get("/x")).status == 500


class TestAnExceptionInACallback:
    """FA-25: what is raised inside a callback of libcurl's fails that transfer, and says so once."""

    @pytest.mark.parametrize(
        "where",
        [
            "on_header",
            "on_chunk",
            "on_read",
            "on_prereq",
        ],
    )
    async def test_the_transfer_fails_and_the_process_lives(self, proxy, echo, expect_log, monkeypatch, capfd, where):
        expect_log("upstream|our own fault")
        original = getattr(CurlTransfer, where)
        fail = True

        def fails(self, *arguments):
            if fail:
                raise RuntimeError("our own fault")
            return original(self, *arguments)

        monkeypatch.setattr(CurlTransfer, where, fails)
        running = await proxy(echo.url)
        downstream = await running.connect()
        downstream.timeout = 1.0
        response = await downstream.exchange("POST", "/x", body=b"some body")
        if where == "on_chunk":
            assert (response.status, response.complete) == (200, False)
            downstream = await running.connect()
        else:
            assert (response.status, response.complete) == (502, True)
        fail = False
        for _ in range(3):
            assert (await downstream.exchange("POST", "/x", body=b"some body")).status == 200
        if where != "on_prereq":
            # pycurl itself writes the traceback; nobody hides it.
            assert "our own fault" in capfd.readouterr().err


def block(seconds: float) -> None:
    """Stop the event loop, as a hook of a careless user does."""
    time.sleep(seconds)


class TestABlockedLoop:
    """FA-28: a hook that blocks everything for a while makes no other exchange look slow."""

    BLOCKED = 0.4
    LIMIT = 0.2

    async def blocked_by(self, running) -> None:
        """Let a hook block the loop once."""
        await running.get("/block")

    def options(self) -> dict:
        def choose(handler):
            if handler.request.path == "/block":
                block(self.BLOCKED)
            return self.url

        return {"upstream": choose}

    @pytest.fixture
    async def threaded(self, echo):
        """Yield an upstream that answers while the loop is blocked: it has a thread of its own."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            go = threading.Event()

            def answer(sock: socket.socket) -> None:
                with sock, contextlib.suppress(OSError):
                    while request := sock.recv(65536):
                        if b" /block " in request:
                            sock.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
                            continue
                        if b" /late " in request:
                            go.wait(5)
                            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                            continue
                        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                        # A trickle, faster than the limit, for as long as the loop is blocked and a little longer.
                        for _ in range(16):
                            sock.sendall(b"1\r\nx\r\n")
                            time.sleep(0.05)
                        sock.sendall(LAST_CHUNK)

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

            thread = threading.Thread(target=accept, daemon=True)
            thread.start()
            yield go
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)

    async def test_a_trickle_is_not_cut(self, proxy, threaded):
        running = await proxy(**self.options(), idle_timeout=self.LIMIT)
        downstream = await running.ask("GET", "/trickle")
        await downstream.read_head()
        await self.blocked_by(running)
        assert await downstream.read_body() == b"x" * 16

    async def test_an_answer_that_came_meanwhile_counts(self, proxy, threaded):
        running = await proxy(**self.options(), response_timeout=self.LIMIT)
        downstream = await running.ask("GET", "/late")
        await asyncio.sleep(self.LIMIT / 2)
        threading.Timer(0.05, threaded.set).start()
        await self.blocked_by(running)
        assert (await downstream.read_response()).body == b"ok"

    @pytest.mark.xfail(
        strict=True, reason="libcurl looks at the time before it looks at a connection that was made meanwhile"
    )
    async def test_a_connection_that_was_made_meanwhile_counts(self, proxy, threaded):
        async def rewrite(handler, request):
            if handler.request.path == "/first":
                # Right after this request's connection was begun.
                asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, block, self.BLOCKED)

        threaded.set()
        running = await proxy(**self.options(), rewrite_request=rewrite, connect_timeout=self.LIMIT)
        assert (await running.get("/first")).status == 200

    async def test_a_downstream_that_reads_is_not_cut(self, proxy, upstream):
        def choose(handler):
            if handler.request.path == "/block":
                block(self.BLOCKED)
            return upstream.url

        running = await proxy(choose, write_timeout=self.LIMIT)
        size = 8_000_000

        async def serve(conn, request):
            await conn.respond(200, body=b"x" * (size if request.target == "/x" else 1))

        upstream.serve(serve)
        downstream = await running.connect(receive_buffer=65_536)
        await downstream.request("GET", "/x")
        await downstream.read_head()
        received = bytearray(await downstream.read_some(1_000_000))
        # The thread reads while the loop is blocked.
        downstream.sock.setblocking(True)

        def read() -> None:
            while len(received) < size and (data := downstream.sock.recv(65536)):
                received.extend(data)

        reading = asyncio.get_running_loop().run_in_executor(None, read)
        await running.get("/block")
        await within(reading, "reading all of it")
        for _ in range(2):
            assert (await running.next_outcome()).error is None


class TestAClockThatJumps:
    """FA-24: the wall clock may be set while exchanges run; no limit looks at it."""

    @pytest.mark.parametrize("jump", [3600.0, -3600.0], ids=["ahead", "back"])
    async def test_nothing_times_out(self, proxy, upstream, monkeypatch, jump):
        running = await proxy(
            upstream.url,
            connect_timeout=5,
            response_timeout=5,
            idle_timeout=5,
            write_timeout=5,
            total_timeout=5,
            server_options={"idle_connection_timeout": 5, "body_timeout": 5},
        )
        idle = await running.connect()
        await idle.request("GET", "/idle")
        conn, _ = await upstream.request()
        await conn.respond(200, body=b"one")
        assert (await idle.read_response()).body == b"one"
        # Exchanges before their head, in their body, in an upload.
        waiting = await running.ask("GET", "/waiting")
        waiting_conn = conn
        await conn.read_request()
        reading = await running.ask("GET", "/reading")
        reading_conn, _ = await upstream.request()
        await reading_conn.send_head(200, CHUNKED)
        await reading_conn.send_chunk(b"one")
        await reading.read_head()
        sending = await running.connect()
        await sending.send(b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"one"))
        sending_conn = await upstream.accept()
        await sending_conn.read_head()
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        # Timers that would be due now are run in the next turns.
        await asyncio.sleep(0.1)
        await waiting_conn.respond(200, body=b"waited")
        assert (await waiting.read_response()).body == b"waited"
        await reading_conn.send_chunk(b"two")
        await reading_conn.send_chunk(b"")
        assert await reading.read_body() == b"onetwo"
        await sending.send(chunk(b"two") + LAST_CHUNK)
        assert await sending_conn.read_body() == b"onetwo"
        await sending_conn.respond(204)
        assert (await sending.read_response()).status == 204
        # A new one on the idle connection.
        for conn in upstream.connections:
            conn.close()
        await idle.request("GET", "/idle")
        conn, _ = await upstream.request()
        await conn.respond(200, body=b"two")
        assert (await idle.read_response()).body == b"two"
        monkeypatch.setattr(time, "time", real)


class TestCancelAtTheWorstMoment:
    """FA-27: whatever libcurl is about to do, a cancelled transfer is gone and its handle can be used again."""

    @pytest.fixture
    async def client(self):
        client = CurlClient(max_clients=1)
        yield client
        client.close()

    async def ask(self, client, upstream, target="/x", body=None):
        request = UpstreamRequest("POST" if body else "GET", upstream.url + target, {}, body, None)  # type: ignore[arg-type]
        request.headers = HTTPHeaders()
        return await within(client.send(request), "a response")

    async def check(self, client, upstream) -> None:
        """The one handle is free and works."""
        for _ in range(2):
            asking = asyncio.ensure_future(self.ask(client, upstream, "/next"))
            conn, request = await upstream.request()
            assert request.target == "/next"
            await conn.respond(200, [("Connection", "close")], b"next")
            conn.close()
            assert await (await asking).read() == b"next"

    async def paused(self, client, upstream):
        """Return a response whose transfer libcurl has paused, and its connection."""
        asking = asyncio.ensure_future(self.ask(client, upstream))
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        response = await asking
        sending = asyncio.ensure_future(send_quietly(conn, chunk(PIECE) * 200))
        transfer = response.on_abort.__self__
        await until(lambda: transfer._recv_paused, "the transfer was paused")
        return response, transfer, sending

    async def test_while_paused(self, client, upstream):
        response, _, sending = await self.paused(client, upstream)
        response.abort()
        await sending
        await self.check(client, upstream)

    async def test_right_after_it_was_resumed(self, client, upstream):
        response, transfer, sending = await self.paused(client, upstream)
        while transfer._recv_paused:
            response.stream.read_nowait()
        # libcurl is to be driven in the next turn; it must not find the transfer then.
        response.abort()
        await sending
        await self.check(client, upstream)

    async def test_when_it_is_resumed_afterwards(self, client, upstream):
        response, transfer, sending = await self.paused(client, upstream)
        transfer.cancel()
        transfer.resume_receiving()
        transfer.resume_sending()
        response.stream.read_nowait()
        response.abort()
        await sending
        await self.check(client, upstream)

    async def test_in_the_turn_in_which_it_is_paused(self, client, upstream, monkeypatch):
        loop = asyncio.get_running_loop()
        original = CurlTransfer.on_chunk

        def on_chunk(transfer, data):
            result = original(transfer, data)
            if transfer._recv_paused:
                loop.call_soon(transfer.cancel)
            return result

        monkeypatch.setattr(CurlTransfer, "on_chunk", on_chunk)
        asking = asyncio.ensure_future(self.ask(client, upstream))
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await asking
        await send_quietly(conn, chunk(PIECE) * 200)
        await conn.closed()
        monkeypatch.undo()
        await self.check(client, upstream)

    async def test_an_upload_that_waits_for_bytes(self, client, upstream):
        pipe = BodyPipe(1000)
        asking = asyncio.ensure_future(self.ask(client, upstream, body=pipe))
        conn = await upstream.accept()
        await conn.read_head()
        asking.cancel()
        pipe.write(b"too late")
        pipe.close()
        await asyncio.gather(asking, return_exceptions=True)
        await conn.closed()
        await self.check(client, upstream)

    async def test_a_queued_one_that_libcurl_does_not_take_is_told_so(self, client, upstream):
        first = asyncio.ensure_future(self.ask(client, upstream, "/first"))
        conn, _ = await upstream.request()
        request = UpstreamRequest("G\0T", upstream.url, HTTPHeaders(), None, None)  # type: ignore[arg-type]
        queued = asyncio.ensure_future(client.send(request))
        await asyncio.sleep(0)
        await conn.respond(200, [("Connection", "close")], b"first")
        conn.close()
        assert (await first).status == 200
        with pytest.raises(HookError):
            await within(queued, "its error")
        await self.check(client, upstream)

    async def test_while_queued_and_in_the_turn_in_which_its_turn_comes(self, client, upstream):
        first = asyncio.ensure_future(self.ask(client, upstream, "/first"))
        conn, _ = await upstream.request()
        queued = [asyncio.ensure_future(self.ask(client, upstream, f"/{n}")) for n in range(3)]
        await asyncio.sleep(0)
        queued[1].cancel()
        await asyncio.sleep(0)
        # The end of the first and the cancel of the next in one turn.
        await conn.respond(200, [("Connection", "close")], b"first")
        conn.close()
        await first
        queued[0].cancel()
        second = await upstream.accept()
        try:
            request = await second.read_request()
        except AssertionError:
            # It had left already when it was cancelled.
            second = await upstream.accept()
            request = await second.read_request()
        if request.target == "/0":
            second = await upstream.accept()
            request = await second.read_request()
        assert request.target == "/2"
        await second.respond(200, [("Connection", "close")], b"2")
        second.close()
        assert (await queued[2]).status == 200
        await asyncio.gather(*queued, return_exceptions=True)
        await self.check(client, upstream)


async def send_quietly(conn, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        await conn.send(data)


class TestALoop:
    """FA-26: a proxy that is its own upstream stops after a few rounds."""

    @pytest.mark.parametrize("body", [None, b"some body"])
    async def test_ends_with_508(self, proxy, expect_log, body):
        expect_log("came through")
        port: list[int] = []
        running = await proxy(lambda: f"http://127.0.0.1:{port[0]}")
        port.append(running.port)
        response = await running.request("POST" if body else "GET", "/x", body=body)
        assert (response.status, response.complete) == (508, True)
        await until(lambda: draining.active_exchanges() == 0, "no exchange was left")
        assert len(running.outcomes) < 10

    async def test_of_two_proxies_ends_too(self, proxy, expect_log):
        expect_log("came through")
        port: list[int] = []
        first = await proxy(lambda: f"http://127.0.0.1:{port[0]}", via="one")
        second = await proxy(first.url, via="two")
        port.append(second.port)
        assert (await first.get("/x")).status == 508
        assert len(first.outcomes) + len(second.outcomes) < 20


class TestANameThatDoesNotResolve:
    """FA-16: it is a 502, and nobody else waits for the resolver."""

    async def test_is_a_502_and_others_are_prompt(self, proxy, echo, expect_log):
        expect_log("resolve")

        def choose(handler):
            return echo.url if handler.request.path == "/good" else "http://no-such-host.invalid"

        running = await proxy(choose, connect_timeout=3)
        bad = [await running.ask("GET", f"/bad/{n}") for n in range(10)]
        slowest = 0.0
        for _ in range(20):
            started = monotonic()
            assert (await running.get("/good")).status == 200
            slowest = max(slowest, monotonic() - started)
        assert slowest < 0.5
        for downstream in bad:
            # 504 where the resolver itself does not answer.
            assert (await downstream.read_response()).status in (502, 504)


class TestTheEnvironment:
    """FA-21: neither http_proxy nor .netrc has a say in where requests go and with whose name."""

    async def test_is_ignored(self, tmp_path: Path):
        (tmp_path / ".netrc").write_text(
            "machine 127.0.0.1 login someone password secret\ndefault login x password y\n"
        )
        (tmp_path / ".curlrc").write_text("proxy = http://127.0.0.1:1\n")
        nowhere = "http://127.0.0.1:1"
        names = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
        env = {**dict.fromkeys(names, nowhere), "no_proxy": "", "NO_PROXY": "", "HOME": str(tmp_path)}
        async with EchoUpstream() as echo:
            starting = StandaloneProxy("--to", echo.url, env=env)
            proxy = await asyncio.to_thread(starting.__enter__)
            try:
                async with await Downstream.connect(proxy.port) as downstream:
                    assert (await downstream.exchange("GET", "/x")).status == 200
                assert not echo.requests[-1].has("Authorization")
                assert not echo.requests[-1].has("Proxy-Authorization")
                assert echo.requests[-1].target == "/x"
            finally:
                await asyncio.to_thread(proxy.stop)


class TestADownstreamThatLeavesAtOnce:
    """FA-01: its end comes with its request, before anybody waits for it."""

    @pytest.mark.parametrize("warm", [False, True], ids=["first request", "later request"])
    @pytest.mark.parametrize("leave", ["close", "reset"])
    async def test_the_upstream_sees_it(self, proxy, upstream, leave, warm):
        running = await proxy(upstream.url, retries=0)
        downstream = await running.connect()
        if warm:
            await downstream.request("GET", "/warm")
            conn, _ = await upstream.request()
            await conn.respond(200, body=b"warm")
            assert (await downstream.read_response()).body == b"warm"
            assert (await running.next_outcome()).error is None
        await downstream.request("GET", "/x")
        getattr(downstream, leave)()
        # Nobody answers, so nothing else ends it.
        assert (await running.next_outcome()).status == 499
        await until(lambda: not upstream.busy, "no upstream connection stayed in the middle of an exchange")


class TestAnExchangeThatEnded:
    """What is told of its body afterwards keeps nothing of it alive; the soak shows what that costs."""

    async def test_is_not_watched_again_when_its_body_ends_in_the_same_turn(self):
        upload = BodyPipe(1000)
        loop = asyncio.get_running_loop()
        watchdog = Watchdog(ProxyOptions(upstream="http://h"), lambda error: None, lambda: 0, lambda: False, loop)
        watchdog.request_started(upload, "http://h")
        watchdog.stop()
        upload.close()
        watchdog.upload_ended()
        try:
            assert watchdog._timer is None
        finally:
            watchdog.stop()


class TestAHalfClosedDownstream:
    """ST-08: who ends its side after the request gets the answer, or the upstream is let go; nobody waits."""

    async def test_is_answered_or_let_go(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        downstream.half_close()
        # Documented: as Tornado's server, the proxy takes the end of the requests for the end of the client.
        await conn.closed()
        assert (await running.next_outcome()).status == 499
        assert await downstream.read_until_closed() == b""
