"""How connections end: by the client, the application, the clock, or the server's own end."""

from __future__ import annotations

import asyncio
import resource
import socket

import pytest
from tornado.httputil import HTTPHeaders

from tests.server.conftest import OK, respond
from tests.support.downstream import Downstream

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class Closing:
    """Notes in the recorder that the client has left."""

    def __init__(self, recorder):
        self.recorder = recorder

    def __call__(self, connection):
        connection.set_close_callback(lambda: self.recorder.note("left"))
        self.recorder.note("ready")


class TestClientsThatLeave:
    @pytest.mark.parametrize("leave", ["close", "half_close", "reset"])
    async def test_the_application_is_told_while_it_works(self, serve, recorder, leave):
        recorder.on_finish = Closing(recorder)
        downstream = await serve(recorder).ask(GET)
        await recorder.seen("ready")
        getattr(downstream, leave)()
        await recorder.seen("left")
        assert recorder.connections[0].has_left()

    @pytest.mark.parametrize("leave", ["close", "reset"])
    async def test_also_behind_pipelined_requests(self, serve, recorder, leave):
        recorder.on_finish = Closing(recorder)
        downstream = await serve(recorder).ask(GET * 100)
        await recorder.seen("ready")
        getattr(downstream, leave)()
        await recorder.seen("left")
        assert len(recorder.heads) == 1

    async def test_also_when_so_much_is_pipelined_that_nothing_more_is_read(self, serve, recorder):
        recorder.on_finish = Closing(recorder)
        running = serve(recorder, linger_time=0.1)
        downstream = await running.ask(GET + b"x" * 150_000)
        await recorder.seen("ready")
        assert not recorder.connections[0].has_left()
        downstream.half_close()
        await recorder.seen("left")

    async def test_an_idle_client_may_leave(self, serve, recorder):
        recorder.on_finish = respond
        running = serve(recorder)
        downstream = await running.ask(GET)
        assert (await downstream.read_response()).status == 200
        downstream.close()
        await running.server._empty.wait()

    async def test_a_reader_that_half_closes_after_the_response_gets_all_of_it(self, serve, recorder):
        recorder.on_finish = lambda connection: respond(connection, b"x" * 5_000_000)
        running = serve(recorder)
        downstream = await running.connect(receive_buffer=4096)
        await downstream.send(GET)
        assert (await downstream.read_head()).status == 200
        downstream.half_close()
        assert len(await downstream.read_body()) == 5_000_000


class TestAborting:
    @pytest.mark.parametrize("fields", [{}, {"Content-Length": "100"}])
    async def test_what_was_written_goes_out_and_the_rest_is_missed(self, serve, recorder, fields):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders(fields), b"begun")
            connection.abort()
            connection.abort()
            assert connection.write(b"x").exception() is not None

        recorder.on_finish = send
        downstream = await serve(recorder).ask(GET)
        response = await downstream.read_response()
        assert (response.complete, response.body) == (False, b"begun")
        assert not downstream.was_reset

    async def test_a_body_that_ends_with_the_connection_ends_with_a_reset(self, serve, recorder):
        recorder.on_finish = lambda connection: connection.write_headers(OK, HTTPHeaders(), b"begun")
        downstream = await serve(recorder).ask(b"GET / HTTP/1.0\r\n\r\n")
        assert (await downstream.read_head()).status == 200
        recorder.connections[0].abort()
        assert await downstream.closed() == "reset"

    async def test_before_the_head_the_client_sees_only_the_end(self, serve, recorder):
        recorder.on_finish = lambda connection: connection.abort()
        assert await serve(recorder).talk(GET) == b""

    async def test_a_delegate_whose_body_is_coming_is_told(self, serve, recorder):
        recorder.on_head = lambda connection: connection.abort()
        assert await serve(recorder).talk(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n") == b""
        await recorder.seen("close")

    async def test_a_stream_detached_from_who_has_left_is_closed(self, serve, recorder):
        recorder.on_finish = Closing(recorder)
        downstream = await serve(recorder).ask(GET)
        await recorder.seen("ready")
        downstream.close()
        await recorder.seen("left")
        assert recorder.connections[0].detach().closed()


class TestTimes:
    async def test_a_head_that_does_not_end_gets_408(self, serve, recorder):
        answer = await serve(recorder, header_timeout=0.05, linger_time=0.1).talk(b"GET / HTTP/1.1\r\nHo")
        assert answer == b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

    async def test_a_connection_without_a_byte_is_closed(self, serve, recorder):
        assert await serve(recorder, header_timeout=0.05).talk(b"") == b""

    async def test_an_idle_connection_is_closed(self, serve, recorder):
        recorder.on_finish = respond
        downstream = await serve(recorder, idle_timeout=0.05).ask(GET)
        assert (await downstream.read_response()).status == 200
        assert await downstream.closed() == "end"

    async def test_a_second_head_has_its_own_time(self, serve, recorder):
        recorder.on_finish = respond
        downstream = await serve(recorder, header_timeout=0.05, idle_timeout=30).ask(GET + b"GET /")
        assert (await downstream.read_response()).status == 200
        assert (await downstream.read_response()).status == 408

    async def test_the_application_has_all_the_time(self, serve, recorder):
        recorder.on_finish = lambda connection: asyncio.get_running_loop().call_later(0.2, respond, connection)
        running = serve(recorder, header_timeout=0.02, idle_timeout=0.02)
        downstream = await running.ask(GET)
        assert (await downstream.read_response()).status == 200

    async def test_a_client_that_never_ends_its_side_is_given_up(self, serve, recorder):
        running = serve(recorder, linger_time=0.05)
        downstream = await running.ask(b"bad\r\n\r\n")
        assert (await downstream.read_response()).status == 400
        await running.server._empty.wait()


class TestDraining:
    async def test_what_runs_is_finished_and_says_that_it_is_the_last(self, serve, recorder):
        recorder.on_finish = lambda connection: recorder.note("ready")
        running = serve(recorder)
        idle = await running.connect()
        downstream = await running.ask(GET)
        await recorder.seen("ready")
        draining = asyncio.ensure_future(running.server.drain())
        assert await idle.closed() == "end"
        assert not draining.done()
        respond(recorder.connections[0])
        response = await downstream.read_response()
        assert (response.body, response.header("Connection")) == (b"ok", "close")
        await draining
        with pytest.raises(ConnectionRefusedError):
            await running.connect()

    async def test_requests_that_are_on_their_way_are_answered(self, serve, recorder):
        recorder.on_finish = respond
        running = serve(recorder)
        kept = await running.ask(GET)
        assert (await kept.read_response()).status == 200
        new = await running.connect()
        await kept.send(GET)
        await new.send(GET)
        await running.server.drain()
        assert (await kept.read_response()).status == 200
        assert (await new.read_response()).status == 200

    async def test_without_connections_it_ends_at_once(self, serve, recorder):
        await serve(recorder).server.drain()

    async def test_closing_all_tells_the_application(self, serve, recorder):
        recorder.on_finish = Closing(recorder)
        running = serve(recorder)
        downstream = await running.ask(GET)
        await recorder.seen("ready")
        await running.server.close_all_connections()
        await recorder.seen("left")
        assert await downstream.read_until_closed() == b""


class TestAccepting:
    async def test_without_descriptors_it_waits_and_then_goes_on(self, serve, recorder, expect_log, monkeypatch):
        monkeypatch.setattr("tornado_proxy.server.http1.ACCEPT_RETRY", 0.05)
        recorder.on_finish = respond
        running = serve(recorder)
        sock = socket.socket()
        sock.setblocking(False)
        lines = expect_log("cannot accept connections: Too many open files")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as probe:
            used = probe.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                socket.socket()
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", running.port))
            downstream = Downstream(sock, "downstream")
            await downstream.send(GET)
            while len(lines.lines) < 2:
                await asyncio.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(lines.lines) < 10
        assert (await downstream.read_response()).status == 200
        downstream.close()
