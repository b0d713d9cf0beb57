"""Requests and responses over HTTP/2, for any delegate and for Tornado's own handlers."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path

import pytest
from tornado import web
from tornado.httputil import HTTPHeaders, HTTPOutputError, ResponseStartLine
from tornado.iostream import StreamClosedError

from tests.server.conftest import OK, answer, respond
from tests.server.handlers import Flushing, Upload
from tests.support.http2 import END_STREAM, Code, Type, frame, request_fields, rst_stream


class TestRequests:
    async def test_what_the_application_is_told(self, serve, recorder):
        recorder.on_finish = respond
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("POST", "/x?y", [("x-a", "1")], b"hello")
        assert (await client.response(stream)).body == b"ok"
        ((start_line, headers),) = recorder.heads
        assert tuple(start_line) == ("POST", "/x?y", "HTTP/2.0")
        assert list(headers.get_all()) == [("X-A", "1"), ("Host", "a")]
        assert recorder.events == [("head", "POST", "/x?y"), ("data", b"hello"), ("finish",)]

    async def test_many_at_a_time_answered_in_any_order(self, serve, recorder):
        client = await serve(recorder, http2=True).connect2()
        streams = [await client.request("GET", f"/{number}") for number in range(50)]
        await recorder.seen("finish", count=50)
        for connection in reversed(recorder.connections):
            respond(connection, connection._head.target.encode())
        for number, stream in enumerate(streams):
            assert (await client.response(stream)).body == f"/{number}".encode()

    async def test_a_thousand_one_after_the_other(self, serve, recorder):
        recorder.on_finish = respond
        running = serve(recorder, http2=True)
        client = await running.connect2()
        for _ in range(1000):
            assert (await client.exchange("GET", "/")).status == 200
        (connection,) = running.server._connections
        assert not connection.streams
        assert len(connection.engine.streams) <= 1

    @pytest.mark.parametrize("fields", [[("x-a", "1"), ("connection", "close")], [("X-A", "1")], [("te", "gzip")]])
    async def test_malformed_ones_never_reach_it(self, serve, recorder, fields):
        recorder.on_finish = respond
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("GET", "/x", fields)
        assert (await client.response(stream)).reset == Code.PROTOCOL
        # The table of HPACK is still the same on both sides.
        assert (await client.exchange("GET", "/", [("x-a", "1")])).status == 200
        assert [start_line.path for start_line, _ in recorder.heads] == ["/"]

    async def test_a_malformed_end_is_no_end(self, serve, recorder):
        """What was promised and did not come makes the request unfinished, not shorter."""
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("POST", "/x", [("content-length", "5")], b"abc")
        assert (await client.response(stream)).reset == Code.PROTOCOL
        await recorder.seen("close")
        assert ("finish",) not in recorder.events

    async def test_nor_is_more_than_was_promised_delivered(self, serve, recorder):
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("POST", "/x", [("content-length", "3")], b"abcd", end=False)
        assert (await client.response(stream)).reset == Code.PROTOCOL
        await recorder.seen("close")
        assert recorder.body == b""

    async def test_who_waits_to_be_asked_for_the_body_is_asked(self, serve, recorder):
        recorder.on_finish = respond
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("POST", "/", [("expect", "100-continue")], end=False)
        await client.read_until(lambda seen: seen.type == Type.HEADERS)
        assert client.responses[stream].interim == [(100, [])]
        await client.data(stream, b"x", end=True)
        response = await client.response(stream)
        assert (response.status, response.interim) == (200, [(100, [])])

    @pytest.mark.parametrize("refuse", [True, False])
    async def test_but_not_needlessly(self, serve, recorder, refuse):
        """Nor when it is refused, nor when it has not waited (RFC 9110 section 10.1.1)."""
        taken = asyncio.Future()
        if refuse:
            recorder.on_head = respond
        else:
            recorder.on_finish = respond
            recorder.head_futures = [taken]
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request(
            "POST", "/", [("expect", "100-continue")], None if refuse else b"x", end=not refuse
        )
        if not refuse:
            await client.ping()
            assert recorder.events == [("head", "POST", "/")]
            taken.set_result(None)
        response = await client.response(stream)
        assert (response.status, response.interim) == (200, [])

    async def test_connect_is_refused(self, serve, recorder):
        client = await serve(recorder, http2=True).connect2()
        await client.send(client.head([(":method", "CONNECT"), (":authority", "a:443")], end=False))
        response = await client.response(1)
        assert (response.status, response.complete) == (501, True)
        assert (await client.rst_stream(1)).code == Code.NO_ERROR
        assert not recorder.heads

    async def test_trailers_end_a_body(self, serve, recorder):
        recorder.on_finish = respond
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("POST", "/x", body=b"abc", end=False)
        await client.send(frame(Type.HEADERS, client.block([("x-t", "1")]), stream=stream, flags=END_STREAM | 4))
        assert (await client.response(stream)).status == 200
        assert recorder.body == b"abc"
        assert list(recorder.connections[0].request_trailers.get_all()) == [("X-T", "1")]
        assert "X-T" not in recorder.heads[0][1]

    async def test_there_may_be_none(self, serve, recorder):
        recorder.on_finish = respond
        client = await serve(recorder, http2=True).connect2()
        assert (await client.exchange("POST", "/x", body=b"abc")).status == 200
        assert recorder.connections[0].request_trailers is None

    @pytest.mark.parametrize("fields", [[("x", "y")] * 101, [("x", "y" * 900)] * 20], ids=["lines", "bytes"])
    async def test_too_many_trailers_are_refused(self, serve, recorder, fields):
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("POST", "/x", body=b"abc", end=False)
        block = client.block(fields)
        await client.send(frame(Type.HEADERS, block[:16000], stream=stream, flags=END_STREAM))
        await client.send(frame(Type.CONTINUATION, block[16000:], stream=stream, flags=4))
        response = await client.response(stream)
        assert (response.status, response.complete) == (431, True)
        await recorder.seen("close")
        assert ("finish",) not in recorder.events
        # The connection goes on, and so does its table.
        recorder.on_finish = respond
        assert (await client.exchange("GET", "/y", fields[:2])).status == 200

    async def test_an_application_that_raises_is_an_answer(self, serve, recorder, expect_log):
        def fail(connection):
            raise ZeroDivisionError

        recorder.on_head = fail
        expect_log("Uncaught exception")
        client = await serve(recorder, http2=True).connect2()
        assert (await client.exchange("GET", "/")).status == 500

    async def test_so_is_one_that_does_not_take_the_request_at_all(self, serve, expect_log):
        class Broken(web.Application):
            def start_request(self, server_conn, request_conn):
                raise ZeroDivisionError

        expect_log("Uncaught exception")
        client = await serve(Broken([]), http2=True).connect2()
        assert (await client.exchange("POST", "/", body=b"x")).status == 500


class TestResponses:
    async def test_a_small_one_is_one_write(self, serve, recorder):
        answer(recorder, Content_Type="text/plain", Content_Length="3")
        running = serve(recorder, http2=True)
        client = await running.connect2()
        await client.ready()
        await client.ping()
        writes = []
        (connection,) = running.server._connections
        write = connection.write
        connection.write = lambda data: (writes.append(data), write(data))
        response = await client.exchange("GET", "/")
        assert (response.headers, response.body) == ([("content-type", "text/plain"), ("content-length", "3")], b"abc")
        assert [seen.type for seen in client.frames[-2:]] == [Type.HEADERS, Type.DATA]
        assert client.frames[-1].flags & END_STREAM
        assert len(writes) == 1

    @pytest.mark.parametrize(
        ("method", "status", "fields"),
        [
            ("HEAD", 200, {"Content_Length": "9"}),
            ("HEAD", 200, {}),
            ("GET", 304, {"Content_Length": "9"}),
            ("GET", 304, {}),
            ("GET", 204, {}),
            ("GET", 204, {"Content_Length": "0"}),
            ("GET", 200, {"Content_Length": "0"}),
            ("GET", 200, {}),
        ],
    )
    async def test_without_content_the_head_is_the_end(self, serve, recorder, method, status, fields):
        answer(recorder, status, chunks=(), **fields)
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange(method, "/")
        assert (response.status, response.body) == (status, b"")
        expected = [] if status == 204 else [("content-length", value) for value in fields.values()]
        assert response.headers == expected
        assert client.frames[-1].type == Type.HEADERS
        assert client.frames[-1].flags & END_STREAM

    @pytest.mark.parametrize("method", ["HEAD", "GET"])
    async def test_where_there_can_be_no_content_nobody_waits_for_the_end(self, serve, recorder, method):
        recorder.on_finish = lambda connection: connection.write_headers(
            ResponseStartLine("", 200 if method == "HEAD" else 304, ""), HTTPHeaders()
        )
        client = await serve(recorder, http2=True).connect2()
        assert (await client.exchange(method, "/")).complete
        recorder.connections[0].finish()
        assert (await client.exchange(method, "/")).complete

    async def test_hop_by_hop_fields_and_framing_are_left_out(self, serve, recorder):
        answer(
            recorder,
            Connection="close, X-Hop",
            X_Hop="1",
            Keep_Alive="timeout=5",
            Transfer_Encoding="chunked",
            Upgrade="h2c",
            X_Kept="1",
        )
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange("GET", "/")
        assert (response.headers, response.body) == ([("x-kept", "1")], b"abc")
        # And nothing of it is heeded: others are on this connection.
        assert (await client.exchange("GET", "/")).status == 200

    async def test_interim_heads_come_before_the_final_one(self, serve, recorder):
        def send(connection):
            connection.send_interim(103, "Early Hints", HTTPHeaders({"Link": "x", "Connection": "close"}))
            connection.send_interim(101, "Switching Protocols", HTTPHeaders())
            connection.send_interim(100, "Continue", HTTPHeaders())
            respond(connection)
            connection.send_interim(103, "Early Hints", HTTPHeaders())

        recorder.on_finish = send
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange("GET", "/")
        assert (response.interim, response.body) == ([(103, [("link", "x")]), (100, [])], b"ok")

    async def test_an_interim_head_does_not_wait_for_the_final_one(self, serve, recorder):
        recorder.on_finish = lambda connection: connection.send_interim(103, "", HTTPHeaders({"Link": "x"}))
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("HEAD", "/")
        await client.read_until(lambda seen: seen.type == Type.HEADERS)
        assert client.responses[stream].interim == [(103, [("link", "x")])]
        recorder.connections[0].write_headers(OK, HTTPHeaders())
        assert (await client.response(stream)).complete

    @pytest.mark.parametrize("length", [{}, {"Content-Length": "1"}])
    async def test_trailers(self, serve, recorder, length):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders(length), b"a")
            assert connection.takes_trailers()
            connection.set_trailers(HTTPHeaders({"Grpc-Status": "0", "Content-Length": "7"}))
            connection.finish()

        recorder.on_finish = send
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange("GET", "/")
        assert (response.body, response.trailers) == (b"a", [("grpc-status", "0")])

    async def test_trailers_without_content(self, serve, recorder):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders())
            connection.set_trailers(HTTPHeaders({"Grpc-Status": "5"}))
            connection.finish()

        recorder.on_finish = send
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange("GET", "/")
        assert (response.complete, response.body, response.trailers) == (True, b"", [("grpc-status", "5")])

    async def test_no_trailers_where_there_is_no_content(self, serve, recorder):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders())
            recorder.note(connection.takes_trailers())
            connection.set_trailers(HTTPHeaders({"X": "y"}))
            connection.finish()

        recorder.on_finish = send
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange("HEAD", "/")
        assert (response.complete, response.trailers) == (True, [])
        await recorder.seen(False)

    async def test_a_head_of_many_frames(self, serve, recorder):
        """It is cut into CONTINUATION frames, with nothing between them."""
        large = {f"X-{number}": "v" * 4000 for number in range(10)}
        answer(recorder, **{name.replace("-", "_"): value for name, value in large.items()})
        client = await serve(recorder, http2=True).connect2()
        client._checker.decoder.max_header_list_size = 10**6
        response = await client.exchange("GET", "/")
        assert response.headers == [(name.lower(), value) for name, value in large.items()]
        assert [seen.type for seen in client.frames if seen.stream == 1][:3] == [Type.HEADERS] + [Type.CONTINUATION] * 2

    async def test_more_than_the_length_is_an_error_and_cuts(self, serve, recorder):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders({"Content-Length": "2"}), b"a")
            with pytest.raises(HTTPOutputError):
                connection.write(b"bcd")
            recorder.note("raised")

        recorder.on_finish = send
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange("GET", "/")
        assert (response.body, response.complete, response.reset) == (b"a", False, Code.INTERNAL)
        await recorder.seen("raised")

    async def test_less_than_the_length_is_an_error_and_cuts(self, serve, recorder):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders({"Content-Length": "2"}), b"a")
            with pytest.raises(HTTPOutputError):
                connection.finish()
            recorder.note("raised")

        recorder.on_finish = send
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange("GET", "/")
        assert (response.body, response.complete, response.reset) == (b"a", False, Code.INTERNAL)
        await recorder.seen("raised")

    async def test_a_second_head_is_an_error_of_that_response_only(self, serve, recorder):
        def send(connection):
            if connection._head.target == "/other":
                respond(connection)
                return
            with pytest.raises(ValueError, match="interim"):
                connection.send_interim(200, "", HTTPHeaders())
            connection.write_headers(OK, HTTPHeaders(), b"a")
            with pytest.raises(HTTPOutputError):
                connection.write_headers(OK, HTTPHeaders(), b"b")
            recorder.note("raised")

        recorder.on_finish = send
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange("GET", "/")
        assert (response.body, response.reset) == (b"a", Code.INTERNAL)
        await recorder.seen("raised")
        assert (await client.exchange("GET", "/other")).body == b"ok"

    @pytest.mark.parametrize("value", ["a\r\nX: b", "a\nb", "a\0b"])
    async def test_nothing_becomes_another_field(self, serve, recorder, value):
        def send(connection):
            headers = HTTPHeaders()
            headers._as_list["X"] = [value]
            with pytest.raises(ValueError, match="Illegal characters"):
                connection.write_headers(OK, headers)
            respond(connection)

        recorder.on_finish = send
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange("GET", "/")
        assert (response.headers, response.body) == ([("content-length", "2")], b"ok")

    async def test_a_connection_cannot_be_taken_over(self, serve, recorder):
        def send(connection):
            with pytest.raises(HTTPOutputError, match="connection of its own"):
                connection.detach()
            with pytest.raises(ValueError, match="101"):
                connection.write_headers(ResponseStartLine("", 101, "Switching Protocols"), HTTPHeaders())
            respond(connection)

        recorder.on_finish = send
        client = await serve(recorder, http2=True).connect2()
        assert (await client.exchange("GET", "/")).body == b"ok"

    async def test_streaming_is_not_held_back(self, serve, recorder):
        recorder.on_finish = lambda connection: connection.write_headers(OK, HTTPHeaders())
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("GET", "/")
        assert (await client.response_head(stream)).body == b""
        for number in range(1, 20):
            assert recorder.connections[0].write(b"x").done()
            assert len(await client.body(stream, number)) == number
        recorder.connections[0].finish()
        assert (await client.response(stream)).complete

    async def test_chunks_of_one_turn_are_one_frame(self, serve, recorder):
        answer(recorder, chunks=[b"x"] * 1000)
        client = await serve(recorder, http2=True).connect2()
        assert (await client.exchange("GET", "/")).body == b"x" * 1000
        assert len([seen for seen in client.frames if seen.type == Type.DATA]) == 1


class Hello(web.RequestHandler):
    def get(self):
        request = self.request
        self.write(" ".join([request.version, request.protocol, request.host, request.remote_ip, request.uri]))

    def post(self):
        self.write(self.request.body)


class Failing(web.RequestHandler):
    def get(self):
        raise ZeroDivisionError

    def post(self):
        self._headers._as_list["X"] = ["not\r\nfine"]
        self.finish("x")

    def put(self):
        raise web.HTTPError(418, reason="Teapot")

    def write_error(self, status_code, **kwargs):
        self.finish(f"sorry: {status_code}")


class Left(web.RequestHandler):
    async def get(self):
        self.left = asyncio.get_running_loop().create_future()
        self.settings["waiting"].set()
        await self.left
        self.settings["left"].set()

    def on_connection_close(self):
        self.left.set_result(None)


RULES = [
    ("/", Hello),
    ("/flushing", Flushing),
    ("/upload", Upload),
    ("/refuse", Upload),
    ("/failing", Failing),
    ("/left", Left),
]


@pytest.fixture
def app():
    def make(**settings):
        return web.Application(RULES, log_function=lambda handler: None, **settings)

    return make


class TestHandlers:
    async def test_a_plain_one(self, serve, app):
        client = await serve(app(), http2=True).connect2()
        response = await client.exchange("GET", "/?x=1")
        assert (response.status, response.body) == (200, b"HTTP/2.0 http a 127.0.0.1 /?x=1")
        assert response.header("content-length") == str(len(response.body))
        etag = response.header("etag")
        unchanged = await client.exchange("GET", "/?x=1", [("if-none-match", etag)])
        assert (unchanged.status, unchanged.body) == (304, b"")
        assert (await client.exchange("HEAD", "/")).status == 405
        assert (await client.exchange("GET", "/nowhere")).status == 404

    async def test_one_that_flushes(self, serve, app):
        client = await serve(app(), http2=True).connect2()
        response = await client.exchange("GET", "/flushing")
        assert (response.body, response.header("content-length")) == (b"onetwo", None)

    async def test_bodies(self, serve, app):
        client = await serve(app(), http2=True).connect2()
        assert (await client.exchange("POST", "/", body=b"x" * 50_000)).body == b"x" * 50_000
        assert (await client.exchange("POST", "/upload", body=b"x" * 50_000)).body == b"50000"
        assert (await client.exchange("POST", "/upload")).body == b"0"

    async def test_a_refusal_before_the_body_is_there(self, serve, app):
        client = await serve(app(), http2=True).connect2()
        stream = await client.request("POST", "/refuse", body=b"x" * 1000, end=False)
        response = await client.response(stream)
        assert (response.status, response.body, response.complete) == (413, b"no", True)
        assert (await client.rst_stream(stream)).code == Code.NO_ERROR
        # What was on its way is no error.
        await client.data(stream, b"x" * 20_000, end=True)
        assert (await client.exchange("GET", "/")).status == 200

    async def test_ranges_of_a_file(self, serve, app, tmp_path: Path):
        (tmp_path / "file").write_bytes(bytes(range(256)) * 1000)
        client = await serve(app(static_path=str(tmp_path)), http2=True).connect2()
        assert (await client.exchange("GET", "/static/file")).body == bytes(range(256)) * 1000
        part = await client.exchange("GET", "/static/file", [("range", "bytes=5-9")])
        assert (part.status, part.body) == (206, bytes([5, 6, 7, 8, 9]))
        head = await client.exchange("HEAD", "/static/file")
        assert (head.body, head.header("content-length")) == (b"", "256000")

    async def test_compression(self, serve, app):
        client = await serve(app(compress_response=True), http2=True).connect2()
        response = await client.exchange("GET", "/flushing", [("accept-encoding", "gzip")])
        assert response.header("content-encoding") == "gzip"
        assert gzip.decompress(response.body) == b"onetwo"

    async def test_errors(self, serve, app, expect_log):
        expect_log("ZeroDivisionError")
        client = await serve(app(), http2=True).connect2()
        response = await client.exchange("GET", "/failing")
        assert (response.status, response.body) == (500, b"sorry: 500")
        response = await client.exchange("PUT", "/failing")
        assert (response.status, response.body) == (418, b"sorry: 418")

    async def test_a_head_that_cannot_be_sent_is_no_hang(self, serve, app, expect_log):
        expect_log("Illegal characters")
        expect_log("Cannot send error response after headers written")
        client = await serve(app(), http2=True).connect2()
        assert (await client.exchange("POST", "/failing")).status == 500
        assert (await client.exchange("GET", "/")).status == 200

    @pytest.mark.parametrize("how", ["at once", "reset", "close"])
    async def test_on_connection_close(self, serve, app, how):
        """Not before the handler has begun, though both frames come together: it would not expect that."""
        waiting, left = asyncio.Event(), asyncio.Event()
        client = await serve(app(waiting=waiting, left=left), http2=True).connect2()
        if how == "at once":
            await client.send(client.head(request_fields(path="/left")) + rst_stream(1))
            await left.wait()
            return
        stream = await client.request("GET", "/left")
        await waiting.wait()
        if how == "close":
            client.close()
        else:
            await client.send(rst_stream(stream))
        await left.wait()

    async def test_an_upgrade_is_no_upgrade(self, serve, recorder):
        """RFC 9113 section 8.6: the field that would ask for one is malformed."""
        client = await serve(recorder, http2=True).connect2()
        await client.send(client.head(request_fields(headers=[("upgrade", "websocket")])))
        assert (await client.response(1)).reset == Code.PROTOCOL


class TestWritingWhenItIsOver:
    async def test_a_write_fails(self, serve, recorder):
        recorder.on_finish = lambda connection: recorder.note("ready")
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("GET", "/")
        await recorder.seen("ready")
        connection = recorder.connections[0]
        connection.set_close_callback(lambda: recorder.note("left"))
        assert not connection.is_closed()
        await client.send(rst_stream(stream))
        await recorder.seen("left")
        assert connection.is_closed()
        assert connection.has_left()
        assert connection.unsent() == 0
        for write in (lambda: connection.write_headers(OK, HTTPHeaders()), lambda: connection.write(b"x")):
            with pytest.raises(StreamClosedError):
                await write()
        connection.finish()
        recorder.on_finish = respond
        assert (await client.exchange("GET", "/")).status == 200
