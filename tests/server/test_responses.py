"""How a response is framed and written, and how a connection is kept (RFC 9112 sections 6 and 9)."""

from __future__ import annotations

import asyncio
import socket

import h11
import pytest
from tornado.httputil import HTTPHeaders, HTTPOutputError, ResponseStartLine
from tornado.iostream import StreamClosedError

from tests.server.conftest import OK, answer, respond

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def get(method="GET", version="1.1", connection=None):
    field = f"Connection: {connection}\r\n" if connection else ""
    return f"{method} / HTTP/{version}\r\nHost: a\r\n{field}\r\n".encode()


class TestFraming:
    async def test_without_a_length_the_body_is_chunked_in_one_write(self, serve, recorder):
        answer(recorder)
        downstream = await serve(recorder).ask(GET)
        expected = b"HTTP/1.1 200 Why\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"
        assert await downstream.read_some() == expected

    async def test_with_a_length_the_body_is_plain_and_the_field_names_are_kept(self, serve, recorder):
        answer(recorder, Content_Length="3", x_y="\xe9", WWW_Authenticate="z")
        downstream = await serve(recorder).ask(GET)
        head = b"HTTP/1.1 200 Why\r\nContent-Length: 3\r\nX-Y: \xe9\r\nWww-Authenticate: z\r\n\r\n"
        assert await downstream.read_exactly(len(head) + 3) == head + b"abc"

    @pytest.mark.parametrize(
        ("method", "status", "fields", "sent"),
        [
            ("HEAD", 200, {"Content_Length": "9"}, b"Content-Length: 9\r\n"),
            ("HEAD", 200, {}, b""),
            ("GET", 304, {"Content_Length": "9"}, b"Content-Length: 9\r\n"),
            ("GET", 304, {}, b""),
            ("GET", 204, {}, b""),
            ("GET", 204, {"Content_Length": "0"}, b""),
        ],
    )
    async def test_responses_without_content_keep_the_connection(self, serve, recorder, method, status, fields, sent):
        answer(recorder, status, chunks=(), **fields)
        downstream = await serve(recorder).ask(get(method) * 2)
        expected = b"HTTP/1.1 %d Why\r\n%b\r\n" % (status, sent)
        assert await downstream.read_exactly(2 * len(expected)) == expected * 2

    async def test_to_http_10_the_end_of_the_connection_ends_the_body(self, serve, recorder):
        answer(recorder)
        data = await serve(recorder).talk(get(version="1.0", connection="keep-alive"))
        assert data == b"HTTP/1.1 200 Why\r\n\r\nabc"

    async def test_http_10_is_kept_if_it_asks_and_the_length_is_known(self, serve, recorder):
        answer(recorder, Content_Length="3")
        downstream = await serve(recorder).ask(get(version="1.0", connection="keep-alive") + get(version="1.0"))
        first = await downstream.read_response()
        assert (first.header("Connection"), first.body) == ("Keep-Alive", b"abc")
        assert (await downstream.read_response()).header("Connection") is None
        assert await downstream.closed() == "end"

    async def test_a_transfer_coding_of_the_application_does_not_stand_beside_a_length(self, serve, recorder):
        answer(recorder, Content_Length="3", Transfer_Encoding="chunked")
        downstream = await serve(recorder).ask(GET)
        assert (await downstream.read_response()).headers == [("Content-Length", "3")]

    async def test_more_than_the_length_is_an_error_and_not_sent(self, serve, recorder):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders({"Content-Length": "2"}), b"a")
            with pytest.raises(HTTPOutputError):
                connection.write(b"bcd")
            recorder.note("raised")

        recorder.on_finish = send
        assert await serve(recorder).talk(GET) == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na"
        await recorder.seen("raised")

    async def test_less_than_the_length_is_an_error_and_closes(self, serve, recorder):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders({"Content-Length": "2"}), b"a")
            with pytest.raises(HTTPOutputError):
                connection.finish()
            recorder.note("raised")

        recorder.on_finish = send
        assert await serve(recorder).talk(GET) == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na"
        await recorder.seen("raised")

    @pytest.mark.parametrize("value", ["a\r\nX: b", "a\nb", "a\rb", "a\0b"])
    @pytest.mark.parametrize("where", ["name", "value", "reason"])
    async def test_nothing_ends_a_line_early(self, serve, recorder, where, value):
        def send(connection):
            headers = HTTPHeaders()
            headers[value if where == "name" else "X"] = value if where == "value" else "x"
            with pytest.raises(ValueError, match="Illegal characters"):
                connection.write_headers(ResponseStartLine("", 200, value if where == "reason" else "OK"), headers)
            respond(connection)

        recorder.on_finish = send
        downstream = await serve(recorder).ask(GET)
        assert (await downstream.read_response()).raw == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    @pytest.mark.parametrize("length", ["3", b"3"])
    async def test_bytes_for_strings_pass_as_with_tornado(self, serve, recorder, length):
        answer(recorder, Content_Length=length, X=b"y")
        downstream = await serve(recorder).ask(GET)
        response = await downstream.read_response()
        assert (response.body, response.header("X")) == (b"abc", "y")


class TestConnections:
    @pytest.mark.parametrize("connection", ["close", "Close", "keep-alive, close", "close, x", "x ,\tclose"])
    async def test_close_anywhere_in_the_list_closes(self, serve, recorder, connection):
        answer(recorder, Content_Length="3")
        data = await serve(recorder).talk(get(connection=connection))
        assert data == b"HTTP/1.1 200 Why\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"

    async def test_the_application_may_close(self, serve, recorder):
        answer(recorder, Content_Length="3", Connection="close")
        data = await serve(recorder).talk(GET)
        assert data == b"HTTP/1.1 200 Why\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"

    async def test_close_after_response_is_said_and_done(self, serve, recorder):
        def send(connection):
            connection.close_after_response()
            respond(connection)

        recorder.on_finish = send
        assert b"Connection: close\r\n" in await serve(recorder).talk(GET)

    async def test_a_response_is_read_before_the_next_request_is_handed_on(self, serve, recorder):
        """Whether the application waits or not: else a client that pipelines and never reads fills the memory."""

        def send(connection):
            recorder.note("unread", connection._owner.write_paused)
            respond(connection, b"x" * 1_000_000)
            if connection._owner.write_paused:
                recorder.note("full")

        recorder.on_finish = send
        running = serve(recorder)
        downstream = await running.connect(receive_buffer=4096)
        await downstream.send(GET * 50)
        await recorder.seen("full")
        # Time enough for the next request, if it were handed on.
        assert len((await (await running.ask(GET)).read_response()).body) == 1_000_000
        for _ in range(50):
            assert len((await downstream.read_response()).body) == 1_000_000
        assert recorder.events.count(("unread", False)) == 51

    async def test_a_thousand_requests_on_one_connection(self, serve, recorder):
        recorder.on_finish = respond
        downstream = await serve(recorder).connect()
        for _ in range(1000):
            await downstream.send(GET)
            assert (await downstream.read_response()).body == b"ok"
        assert len(recorder.connections) == 1000

    async def test_pipelined_requests_are_answered_in_order_one_at_a_time(self, serve, recorder):
        waiting = []
        recorder.on_finish = waiting.append
        downstream = await serve(recorder).ask(b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % n for n in range(100)))
        for n in range(100):
            await recorder.until(lambda: waiting, "a request")
            assert len(recorder.heads) == n + 1
            respond(waiting.pop(), b"%d" % n)
            assert (await downstream.read_response()).body == b"%d" % n

    async def test_a_hundred_pipelined_requests_answered_at_once(self, serve, recorder):
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(GET * 100)
        for _ in range(100):
            assert (await downstream.read_response()).body == b"ok"

    async def test_what_is_pipelined_waits_in_the_kernel_beyond_a_bound(self, serve, recorder):
        waiting = []
        recorder.on_finish = waiting.append
        running = serve(recorder)
        downstream = await running.ask(GET)
        await recorder.until(lambda: waiting, "a request")
        sending = asyncio.ensure_future(downstream.send(GET * 200_000))
        (connection,) = running.server._connections
        while not connection.reading_paused:
            await asyncio.sleep(0)
        assert len(connection._pending) <= 2 * 65536
        sending.cancel()

    async def test_so_it_does_where_the_client_reads_and_each_is_answered_at_once(self, serve, recorder):
        recorder.on_finish = respond
        running = serve(recorder)
        downstream = await running.connect()
        loop = asyncio.get_running_loop()
        sending = asyncio.ensure_future(downstream.send(GET * 200_000))
        (most, received) = (0, 0)
        while received < 200_000:
            received += len(await loop.sock_recv(downstream.sock, 65536))
            most = max(most, *(len(connection._pending) for connection in running.server._connections))
        sending.cancel()
        assert most < 300_000

    async def test_a_strict_client_understands_every_kind_of_response(self, serve, recorder):
        kinds = [
            ("GET", 200, {}),
            ("GET", 200, {"Content_Length": "3"}),
            ("HEAD", 200, {}),
            ("GET", 204, {}),
            ("GET", 304, {}),
        ]
        running = serve(recorder)
        client = h11.Connection(h11.CLIENT)
        downstream = await running.connect()
        for method, status, fields in kinds * 3:
            answer(recorder, status, (b"a", b"bc") if (method, status) == ("GET", 200) else (), **fields)
            await downstream.send(client.send(h11.Request(method=method, target="/", headers=[("Host", "a")])))
            await downstream.send(client.send(h11.EndOfMessage()))
            body = b""
            while True:
                event = client.next_event()
                if event is h11.NEED_DATA:
                    client.receive_data(await downstream.read_some())
                elif isinstance(event, h11.Response):
                    assert event.status_code == status
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    assert isinstance(event, h11.EndOfMessage)
                    break
            assert body == (b"abc" if (method, status) == ("GET", 200) else b"")
            client.start_next_cycle()


async def not_reading(running, recorder):
    """Return a client that reads little at a time, and the application's side of a request that is not answered yet."""
    recorder.on_finish = lambda connection: recorder.note("ready")
    downstream = await running.connect(receive_buffer=4096)
    await downstream.send(GET)
    await recorder.seen("ready")
    return downstream, recorder.connections[0]


class TestWriting:
    async def test_a_write_waits_for_a_client_that_does_not_read(self, serve, recorder):
        downstream, connection = await not_reading(serve(recorder), recorder)
        assert connection.write_headers(OK, HTTPHeaders(), b"x").done()
        assert connection.unsent() == 0 or connection.unsent() > 0
        sent = 1
        while (future := connection.write(b"x" * 65536)).done():
            sent += 65536
            assert sent < 20_000_000
        sent += 65536
        assert connection.unsent() > 65536
        connection.finish()
        body = await downstream.read_response()
        assert len(body.body) == sent
        await future

    @pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="this system has no TCP_NOTSENT_LOWAT")
    async def test_the_kernel_takes_little_for_a_client_that_does_not_read(self, serve, recorder):
        downstream, connection = await not_reading(serve(recorder), recorder)
        connection.write_headers(OK, HTTPHeaders(), b"x")
        sent, taken = 0, True
        while taken:
            future = connection.write(b"x" * 65536)
            sent += 65536
            # It may take more a moment later: what it holds for a socket grows.
            taken = future in (await asyncio.wait([future], timeout=0.3))[0]
        assert sent < 1.5 * 1024 * 1024
        downstream.reset()
        with pytest.raises(StreamClosedError):
            await future

    async def test_a_write_fails_when_the_client_is_gone(self, serve, recorder):
        downstream, connection = await not_reading(serve(recorder), recorder)
        connection.set_close_callback(lambda: recorder.note("left"))
        connection.write_headers(OK, HTTPHeaders(), b"x")
        while (future := connection.write(b"x" * 65536)).done():
            pass
        downstream.reset()
        with pytest.raises(StreamClosedError):
            await future
        await recorder.seen("left")
        with pytest.raises(StreamClosedError):
            await connection.write(b"x")
        connection.finish()

    async def test_the_first_chunk_is_not_held_beyond_the_turn(self, serve, recorder):
        recorder.on_finish = lambda connection: connection.write_headers(OK, HTTPHeaders(), b"x")
        downstream = await serve(recorder).ask(GET)
        assert (await downstream.read_head()).status == 200
        assert await downstream.read_body(1) == b"x"

    async def test_interim_heads_go_to_http_11_before_the_final_one(self, serve, recorder):
        def send(connection):
            connection.send_interim(103, "Early Hints", HTTPHeaders({"Link": "x"}))
            respond(connection)
            connection.send_interim(103, "Early Hints", HTTPHeaders())

        recorder.on_finish = send
        running = serve(recorder)
        response = await (await running.ask(GET)).read_response()
        assert [(head.status, head.headers) for head in response.interim] == [(103, [("Link", "x")])]
        assert b" 103 " not in await running.talk(get(version="1.0"))


class TestTrailers:
    @pytest.mark.parametrize("te", ["trailers", "gzip;q=0.5, Trailers"])
    async def test_come_behind_the_last_chunk_to_who_asks(self, serve, recorder, te):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders(), b"a")
            assert connection.takes_trailers()
            connection.set_trailers(HTTPHeaders({"Grpc-Status": "0", "X": "y"}))
            connection.finish()

        recorder.on_finish = send
        downstream = await serve(recorder).ask(GET.replace(b"\r\n\r\n", b"\r\nTE: %b\r\n\r\n" % te.encode()))
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        expected = head + b"1\r\na\r\n0\r\nGrpc-Status: 0\r\nX: y\r\n\r\n"
        assert await downstream.read_exactly(len(expected)) == expected

    async def test_what_frames_a_message_is_none(self, serve, recorder):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders(), b"a")
            fields = {"Content-Length": "9", "Transfer-Encoding": "x", "Host": "b", "Connection": "X-A", "X-A": "1"}
            connection.set_trailers(HTTPHeaders(fields))
            connection.finish()

        recorder.on_finish = send
        downstream = await serve(recorder).ask(GET)
        assert (await downstream.read_response()).raw.endswith(b"\r\n1\r\na\r\n0\r\n\r\n")

    async def test_nothing_ends_a_line_early(self, serve, recorder):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders(), b"a")
            trailers = HTTPHeaders()
            trailers._as_list["X"] = ["a\r\nY: b"]
            with pytest.raises(ValueError, match="Illegal characters"):
                connection.set_trailers(trailers)
            connection.finish()

        recorder.on_finish = send
        downstream = await serve(recorder).ask(GET)
        assert (await downstream.read_response()).body == b"a"

    @pytest.mark.parametrize(
        ("field", "length"),
        [(b"", None), (b"TE: gzip\r\n", None), (b"TE: trailers\r\n", "1")],
        ids=["", "gzip", "length"],
    )
    async def test_are_for_nobody_else(self, serve, recorder, field, length):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders({"Content-Length": length} if length else {}), b"a")
            recorder.note(connection.takes_trailers())
            connection.finish()

        recorder.on_finish = send
        downstream = await serve(recorder).ask(b"GET / HTTP/1.1\r\nHost: a\r\n" + field + b"\r\n")
        assert (await downstream.read_response()).body == b"a"
        await recorder.seen(False)
