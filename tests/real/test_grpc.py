"""gRPC through the proxy: grpcio's client in front, grpcio's server behind."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psutil
import pytest
from tornado.netutil import bind_sockets
from tornado.web import Application

pytest.importorskip("grpc", reason="grpcio is not installed")
pytest.importorskip("h2", reason="h2, which is in front, is not installed")

import grpc

from tests.real.grpc_service import PREFIX, EchoClient, EchoService, Sender, message
from tests.support.h2_upstream import H2Stream, H2Upstream
from tests.support.process import StandaloneProxy
from tests.support.wire import within
from tornado_proxy import ProxyError, ProxyHandler, mount
from tornado_proxy.clients import close_clients
from tornado_proxy.messages import Outcome
from tornado_proxy.server import HTTPServer


@pytest.fixture(scope="module")
def service() -> Iterator[EchoService]:
    with EchoService() as service:
        yield service


class Front:
    """The proxy, with HTTP/2 in front."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None, *, prefix: str = "/", **options: Any) -> None:
        self.outcomes: list[Outcome] = []
        rule = mount(
            prefix,
            url,
            client="curl",
            client_options={"http_version": "2-prior-knowledge"},
            on_done=lambda _, outcome: self.outcomes.append(outcome),
            **options,
        )
        application = Application([rule], log_function=lambda _: None)
        self._server = HTTPServer(application, http2=True, ssl_options=tls)
        sockets = bind_sockets(0, "127.0.0.1")
        self.port: int = sockets[0].getsockname()[1]
        self._server.add_sockets(sockets)

    async def stop(self) -> None:
        self._server.stop()
        await within(self._server.drain(), "the drain")
        await close_clients()

    async def call(self, calls: Callable[[EchoClient], Any], **secure: Any) -> Any:
        """Return what ``calls`` returns, which has a client of its own; what it raises is the call's status."""

        def run() -> Any:
            with EchoClient(f"localhost:{self.port}", **secure) as client:
                try:
                    return calls(client)
                except grpc.RpcError as error:
                    return error

        return await within(asyncio.to_thread(run), "the call", 20)


@contextlib.asynccontextmanager
async def fronted(*args: Any, **options: Any) -> AsyncIterator[Front]:
    front = Front(*args, **options)
    try:
        yield front
    finally:
        await front.stop()


class TestEndToEnd:
    """Through the proxy, what a client is told is what the service said."""

    @pytest.fixture
    async def front(self, service: EchoService) -> AsyncIterator[Front]:
        async with fronted(service.url) as front:
            yield front

    async def test_unary(self, front, service):
        service.seen.clear()
        answer, call = await front.call(
            lambda client: client.unary.with_call(
                b"hello", timeout=5, metadata=[("x-mine", "3"), ("x-mine-bin", b"\0")]
            )
        )
        assert answer == b"hellohello"
        assert dict(call.initial_metadata())["x-initial"] == "1"
        assert dict(call.trailing_metadata()) == {"x-trailing": "2", "x-trailing-bin": b"\0\1\2"}
        seen = service.seen[0]
        assert (seen["x-mine"], seen["x-mine-bin"], seen["via"]) == ("3", b"\0", "2.0 tornado_proxy")

    async def test_by_the_name_of_the_service(self, service):
        async with fronted(service.url + PREFIX.rstrip("/"), prefix=PREFIX.rstrip("/")) as front:
            assert await front.call(lambda client: client.unary(b"hello", timeout=5)) == b"hellohello"
            error = await front.call(lambda client: client.channel.unary_unary("/other.Service/Unary")(b"", timeout=5))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED

    async def test_over_tls(self, service, certificates):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificates.chain, certificates.key)
        credentials = grpc.ssl_channel_credentials(certificates.root.read_bytes())
        async with fronted(service.url, context) as front:
            call = front.call(lambda client: client.unary(b"hello", timeout=5), credentials=credentials)
            assert await call == b"hellohello"

    async def test_an_error(self, front):
        error = await front.call(lambda client: client.unary(b"fail", timeout=5))
        assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "nothing like that: \u00e9")
        assert dict(error.trailing_metadata())["x-trailing"] == "2"

    async def test_an_error_that_is_only_a_head(self, front):
        error = await front.call(lambda client: client.unknown(b"", timeout=5))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    async def test_server_streaming(self, front):
        answers = await front.call(lambda client: list(client.server_stream(b"1000", timeout=10)))
        assert answers == [b"message %d" % number for number in range(1000)]

    async def test_client_streaming(self, front):
        requests = [b"x" * 10_000] * 100
        answer = await front.call(lambda client: client.client_stream(iter(requests), timeout=10))
        assert answer == b"100 1000000"

    async def test_both_ways_message_by_message(self, front):
        def talk(client: EchoClient) -> Any:
            sender = Sender()
            call = client.bidi(sender, timeout=10)
            for number in range(200):
                # Each is answered before the next is sent.
                sender.send(b"message %d" % number)
                assert next(call) == b"message %d" % number
            sender.end()
            return list(call), call.code()

        assert await front.call(talk) == ([], grpc.StatusCode.OK)

    async def test_a_call_that_the_service_ends(self, front):
        def talk(client: EchoClient) -> Any:
            sender = Sender()
            call = client.bidi(sender, timeout=10)
            sender.send(b"one")
            assert next(call) == b"one"
            sender.send(b"stop")
            answers = list(call)
            sender.end()
            return answers, call.code()

        assert await front.call(talk) == ([], grpc.StatusCode.OK)

    async def test_a_deadline_reaches_the_service(self, front, service):
        service.cancelled.clear()
        error = await front.call(lambda client: list(client.hang(b"", timeout=0.3)))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await asyncio.to_thread(service.cancelled.wait, 5)

    async def test_so_does_cancelling(self, front, service):
        service.cancelled.clear()

        def cancel(client: EchoClient) -> Any:
            call = client.hang(b"", timeout=10)
            assert next(call) == b"first"
            call.cancel()
            return call.code()

        assert await front.call(cancel) is grpc.StatusCode.CANCELLED
        assert await asyncio.to_thread(service.cancelled.wait, 5)

    async def test_large_messages(self, front):
        large = bytes(range(256)) * 24_000
        assert await front.call(lambda client: client.unary(large, timeout=20)) == large * 2

    async def test_a_hundred_calls_at_a_time(self, front, service):
        def talk(client: EchoClient) -> Any:
            calls = []
            for number in range(100):
                sender = Sender()
                sender.send(b"%d" % number)
                calls.append((sender, client.bidi(sender, timeout=20)))
            first = [next(call) for _, call in calls]
            connections = psutil.Process().net_connections()
            for sender, _ in calls:
                sender.end()
            return first, [list(call) for _, call in calls], connections

        first, rest, connections = await front.call(talk)
        assert first == [b"%d" % number for number in range(100)]
        assert rest == [[]] * 100
        assert len([one for one in connections if one.raddr and one.raddr.port == service.port]) == 1

    async def test_a_client_that_does_not_read_stalls_the_service(self, front, service):
        service.sent = 0

        def read_late(client: EchoClient) -> Any:
            call = client.flood(b"", timeout=20)
            next(call)
            before = -1
            # Until the service gets no further, which is what is to be shown.
            while before != service.sent:
                before = service.sent
                time.sleep(0.3)
            taken = sum(1 for _ in call)
            return before, taken + 1

        stalled_at, taken = await front.call(read_late)
        assert taken == service.FLOOD
        assert stalled_at < service.FLOOD


class TestStandalone:
    """What the README's recipe says."""

    OPTIONS = (
        *("--http2", "--upstream-http-version", "2-prior-knowledge"),
        *("--response-timeout", "none", "--idle-timeout", "none"),
    )

    @pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
    async def test_the_program(self, service, certificates, tls):
        options = ["--tls-cert", str(certificates.chain), "--tls-key", str(certificates.key)] if tls else []
        starting = StandaloneProxy("--to", service.url, *self.OPTIONS, *options)
        running = await asyncio.to_thread(starting.__enter__)
        credentials = grpc.ssl_channel_credentials(certificates.root.read_bytes()) if tls else None

        def talk() -> Any:
            with EchoClient(f"localhost:{running.port}", credentials=credentials) as client:
                sender = Sender()
                call = client.bidi(sender, timeout=10)
                sender.send(b"one")
                first = next(call)
                sender.end()
                return client.unary(b"hello", timeout=5), first, list(call), call.code()

        try:
            answers = await within(asyncio.to_thread(talk), "the calls", 20)
        finally:
            await asyncio.to_thread(running.stop)
        assert answers == (b"hellohello", b"one", [], grpc.StatusCode.OK)
        assert "Traceback" not in running.output


class TestOurOwnErrors:
    """A status of HTTP that no gRPC service would send is one of gRPC's to its clients."""

    async def status(self, front: Front) -> Any:
        error = await front.call(lambda client: client.unary(b"hello", timeout=5))
        return error.code()

    async def test_nobody_is_there(self, service, expect_log):
        expect_log("connect")
        async with H2Upstream() as upstream:
            pass
        async with fronted(upstream.url) as front:
            assert await self.status(front) is grpc.StatusCode.UNAVAILABLE
        assert front.outcomes[-1].status == 502

    async def test_an_error_in_the_words_of_grpc(self, expect_log):
        """As the README shows it."""
        expect_log("connect")

        def say(error: ProxyError, handler: ProxyHandler) -> None:
            handler.set_status(200)
            handler.set_header("Content-Type", "application/grpc")
            handler.set_header("grpc-status", "8")
            handler.set_header("grpc-message", "come back later")
            handler.finish()

        async with H2Upstream() as upstream:
            pass
        async with fronted(upstream.url, error_callback=say) as front:
            error = await front.call(lambda client: client.unary(b"hello", timeout=5))
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "come back later")

    async def test_no_answer_in_time(self, expect_log):
        expect_log("no answer within")
        async with H2Upstream() as upstream, fronted(upstream.url, response_timeout=0.2) as front:
            assert await self.status(front) is grpc.StatusCode.UNAVAILABLE
        assert front.outcomes[-1].status == 504

    async def test_a_call_that_is_cut(self, expect_log):
        """Behind the head nothing can be said any more; the stream is reset, and never ends as if it were complete."""
        expect_log("reset by server")

        async def cut(stream: H2Stream, _: Any) -> None:
            await stream.send_head(200, [("content-type", "application/grpc")])
            await stream.send_data(message(b"half") + b"\0\0")
            # Read by now: the client has the head.
            await stream.read_body()
            stream.reset()

        async with H2Upstream() as upstream, fronted(upstream.url) as front:
            upstream.serve(cut)
            assert await self.status(front) in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)
        assert front.outcomes[-1].side == "upstream"

    async def test_a_message_that_is_too_large(self, service):
        async with fronted(service.url, max_body_size=3) as front:
            assert await self.status(front) is grpc.StatusCode.UNKNOWN
        assert front.outcomes[-1].status == 413
