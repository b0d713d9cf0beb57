"""What is a request, and what is refused before the application sees it (RFC 9112)."""

from __future__ import annotations

import asyncio

import pytest

from tests.server.conftest import respond

CHUNKED = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def head(*lines: str) -> bytes:
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def get(*fields: str) -> bytes:
    return head("GET / HTTP/1.1", "Host: a", *fields)


BAD_HEADS = {
    "no Host": head("GET / HTTP/1.1"),
    "two Hosts": get("Host: a"),
    "two Hosts in a list": head("GET / HTTP/1.1", "Host: a, b"),
    "Host with userinfo": head("GET / HTTP/1.1", "Host: u@a"),
    "Host with a path": head("GET / HTTP/1.1", "Host: a/b"),
    "Host with a bad port": head("GET / HTTP/1.1", "Host: a:b"),
    "a name of more than 1024 characters": get("X" * 1025 + ": a"),
    "Host with a port that there is not": head("GET / HTTP/1.1", "Host: a:65536"),
    "two Hosts in 1.0": head("GET / HTTP/1.0", "Host: a", "Host: b"),
    "obs-fold": get("X: a", " b"),
    "obs-fold with a tab": get("X: a", "\tb"),
    "space before the first field": head("GET / HTTP/1.1", " X: a", "Host: a"),
    "space before the colon": get("X : a"),
    "space in a name": get("X Y: a"),
    "no colon": get("X"),
    "empty name": get(": a"),
    "non-ASCII name": get("Xé: a"),
    "NUL in a value": get("X: a\0b"),
    "bare CR in a value": get("X: a\rb"),
    "bare CR at the end of a value": get("X: a\r"),
    "control character in a value": get("X: a\x01b"),
    "DEL in a value": get("X: a\x7fb"),
    "bare LF in the fields": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "bare LF everywhere": b"GET / HTTP/1.1\nHost: a\n\n",
    "two spaces after the method": head("GET  / HTTP/1.1", "Host: a"),
    "two spaces after the target": head("GET /  HTTP/1.1", "Host: a"),
    "a space in the target": head("GET /a b HTTP/1.1", "Host: a"),
    "a tab for a space": head("GET\t/ HTTP/1.1", "Host: a"),
    "a space at the end": head("GET / HTTP/1.1 ", "Host: a"),
    "no version": head("GET /", "Host: a"),
    "a small version": head("GET / http/1.1", "Host: a"),
    "a long version": head("GET / HTTP/1.11", "Host: a"),
    "a bad method": head("G(T / HTTP/1.1", "Host: a"),
    "NUL in the target": head("GET /\0 HTTP/1.1", "Host: a"),
    "two empty lines in front": b"\r\n\r\n" + get(),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "CL and TE": get("Content-Length: 0", "Transfer-Encoding: chunked"),
    "TE in 1.0": head("POST / HTTP/1.0", "Host: a", "Transfer-Encoding: chunked"),
    "unequal CLs": get("Content-Length: 1", "Content-Length: 2"),
    "unequal CLs in a list": get("Content-Length: 1, 2"),
    "signed CL": get("Content-Length: +1"),
    "hex CL": get("Content-Length: 0x1"),
    "empty CL": get("Content-Length:"),
    "CL too large": get("Content-Length: 9999999999999999999"),
    "chunked twice": get("Transfer-Encoding: chunked, chunked"),
    "chunked not last": get("Transfer-Encoding: chunked, gzip"),
    "TE with a vertical tab": get("Transfer-Encoding: \x0bchunked"),
}

BAD_BODIES = {
    "no digits": "X\r\n",
    "an empty size": "\r\n",
    "a sign": "+1\r\na\r\n",
    "a prefix": "0x1\r\na\r\n",
    "an underscore": "1_0\r\n",
    "too many digits": "00000000000000001\r\na\r\n",
    "a space before": " 1\r\na\r\n",
    "a space after": "1 \r\na\r\n",
    "a bare LF": "1\na\r\n0\r\n\r\n",
    "a bare CR": "1\ra\r\n0\r\n\r\n",
    "a bare LF in an extension": "1;a\nb\r\na\r\n",
    "a bare CR in an extension": "1;a\rb\r\na\r\n",
    "no CR LF after the data": "1\r\nab\r\n",
    "a bare LF after the data": "1\r\na\n0\r\n\r\n",
    "too long a line": "1;" + "x" * 2000 + "\r\na\r\n",
    "too many extensions": ("1;" + "x" * 900 + "\r\na\r\n") * 20,
    "a trailer without colon": "0\r\nX\r\n\r\n",
    "a trailer without name": "0\r\n: a\r\n\r\n",
    "a folded trailer": "0\r\nX: a\r\n b\r\n\r\n",
    "a trailer that begins folded": "0\r\n X: a\r\n\r\n",
    "a space before the colon of a trailer": "0\r\nX : a\r\n\r\n",
    "a bare LF in the trailers": "0\r\nX: a\n\r\n",
    "a bare CR in a trailer": "0\r\nX: a\rb\r\n\r\n",
    "NUL in a trailer": "0\r\nX: a\0b\r\n\r\n",
    "a request in the trailers": "0\r\nGET / HTTP/1.1\r\n\r\n",
}

TOO_MANY_TRAILERS = {
    "too many": "0\r\n" + "X: y\r\n" * 101 + "\r\n",
    "ten thousand": "0\r\n" + "X: y\r\n" * 10_000 + "\r\n",
    "too much": "0\r\n" + ("X: " + "y" * 900 + "\r\n") * 20 + "\r\n",
    "a megabyte": "0\r\n" + ("X: " + "y" * 900 + "\r\n") * 1200 + "\r\n",
    "a line of a megabyte": "0\r\nX: " + "y" * 1_000_000 + "\r\n\r\n",
    "a line that does not end": "0\r\nX: " + "y" * 20_000,
    "a name that does not end": "0\r\n" + "y" * 20_000,
}


class TestHeads:
    @pytest.mark.parametrize("data", BAD_HEADS.values(), ids=BAD_HEADS)
    async def test_a_bad_head_is_refused_and_the_application_does_not_see_it(self, serve, recorder, data):
        answer = await serve(recorder).talk(data)
        assert answer == b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        assert recorder.events == []

    @pytest.mark.parametrize(
        ("data", "status"),
        [
            (head("GET / HTTP/1.2", "Host: a"), 505),
            (head("GET / HTTP/2.0", "Host: a"), 505),
            (head("GET / HTTP/0.9"), 505),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
            (get("Transfer-Encoding: gzip"), 501),
            (get("X: " + "x" * 70000), 431),
            (get("X: " + "x" * 70000)[:68000], 431),
            (b"GET /" + b"x" * 70000, 414),
            (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        ],
    )
    async def test_some_faults_have_a_status_of_their_own(self, serve, recorder, data, status):
        answer = await serve(recorder).talk(data)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert recorder.events == []

    async def test_a_head_may_have_exactly_the_largest_size(self, serve, recorder):
        recorder.on_finish = respond
        data = get("X: " + "x" * 900)
        data = data.replace(b"X: ", b"X: " + b"y" * (1024 - len(data)))
        running = serve(recorder, max_header_size=1024)
        assert (await (await running.ask(data)).read_response()).status == 200
        assert (await running.talk(data.replace(b"X:", b"X: "))).startswith(b"HTTP/1.1 431 ")

    async def test_one_empty_line_before_the_request_is_ignored(self, serve, recorder):
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(b"\r\n" + get() + b"\r\n" + get())
        assert (await downstream.read_response()).status == 200
        assert (await downstream.read_response()).status == 200

    @pytest.mark.parametrize("method", ["GET", "PROPFIND", "finish", "M-SEARCH", "X!#$%&'*+-.^_`|~9"])
    async def test_every_token_is_a_method(self, serve, recorder, method):
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(head(f"{method} / HTTP/1.1", "Host: a"))
        assert (await downstream.read_response()).status == 200
        assert recorder.events[0] == ("head", method, "/")

    @pytest.mark.parametrize("target", ["/a?b=c#d", "*", "http://u@h:1/x", "/\xe9\xff", "/%zz//../.", "@x", "a:1"])
    async def test_the_target_arrives_as_it_came(self, serve, recorder, target):
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(head(f"GET {target} HTTP/1.1", "Host: a"))
        assert (await downstream.read_response()).status == 200
        assert recorder.events[0] == ("head", "GET", target)

    @pytest.mark.parametrize(
        "host", ["", "a", "a:80", "a:", "[::1]", "[::1]:80", "[fe80::1%25eth0]", "a_b.c-d~", "%41"]
    )
    async def test_a_host_may_be_anything_that_a_uri_can_name(self, serve, recorder, host):
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(head("GET / HTTP/1.1", f"Host: {host}"))
        assert (await downstream.read_response()).status == 200

    async def test_the_fields_arrive_in_order_and_repeated(self, serve, recorder):
        recorder.on_finish = respond
        fields = ["x-a:1", "X-B:  two words\t", "X-a: 3", "x_c:", "ETAG: \xe9", "www-authenticate: x"]
        downstream = await serve(recorder).ask(get(*fields))
        assert (await downstream.read_response()).status == 200
        start_line, headers = recorder.heads[0]
        assert start_line == ("GET", "/", "HTTP/1.1")
        assert list(headers.get_all()) == [
            ("Host", "a"),
            ("X-A", "1"),
            ("X-A", "3"),
            ("X-B", "two words"),
            ("X_c", ""),
            ("Etag", "\xe9"),
            ("Www-Authenticate", "x"),
        ]
        assert headers["x-a"] == "1,3"
        headers.add("X-A", "4")
        assert headers["X-A"] == "1,3,4"

    async def test_a_length_given_twice_is_one(self, serve, recorder):
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(get("Content-Length: 2, 2", "Content-Length: 2") + b"ab")
        assert (await downstream.read_response()).status == 200
        assert recorder.heads[0][1].get_list("Content-Length") == ["2"]
        assert recorder.body == b"ab"


class TestChunks:
    @pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
    async def test_a_bad_chunk_is_refused_and_the_application_told(self, serve, recorder, body):
        answer = await serve(recorder).talk((CHUNKED + body).encode())
        assert answer == b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        await recorder.seen("close")
        assert ("finish",) not in recorder.events

    @pytest.mark.parametrize(
        ("body", "trailers"),
        [
            ("3\r\nabc\r\n0\r\n\r\n", None),
            ("1\r\na\r\n02\r\nbc\r\n000\r\n\r\n", None),
            ('3;x\r\nabc\r\n0;a=b;c="d"\r\n\r\n', None),
            ("3 ; x\r\nabc\r\n0\r\n\r\n", None),
            (
                "3\r\nabc\r\n0\r\nX: y\r\nContent-Length: 9\r\nx:\tz \r\nx-e:\r\n\r\n",
                [("X", "y"), ("X", "z"), ("Content-Length", "9"), ("X-E", "")],
            ),
        ],
    )
    async def test_chunks_extensions_and_trailers_are_read(self, serve, recorder, body, trailers):
        seen = []

        def note_and_respond(connection):
            fields = connection.request_trailers
            seen.append(fields if fields is None else list(fields.get_all()))
            respond(connection)

        recorder.on_finish = note_and_respond
        downstream = await serve(recorder).ask((CHUNKED + body).encode() + get())
        assert (await downstream.read_response()).status == 200
        assert (await downstream.read_response()).status == 200
        assert recorder.body == b"abc"
        assert "X" not in recorder.heads[0][1]
        assert "Content-Length" not in recorder.heads[0][1]
        # Of the second request, which has no body, there are none.
        assert seen == [trailers, None]

    @pytest.mark.parametrize("body", TOO_MANY_TRAILERS.values(), ids=TOO_MANY_TRAILERS)
    async def test_too_many_trailers_are_refused(self, serve, recorder, body):
        """RFC 6585 section 5, as for a head that is too large."""
        answer = await serve(recorder).talk((CHUNKED + body).encode())
        assert answer.startswith(b"HTTP/1.1 431 ")
        await recorder.seen("close")
        assert ("finish",) not in recorder.events

    @pytest.mark.parametrize("step", [1, 7])
    async def test_as_many_as_there_may_be_however_they_come(self, serve, recorder, step):
        recorder.on_finish = respond
        sent = ("0\r\n" + "X: " + "y" * 150 + "\r\n").encode() + b"X: y\r\n" * 99 + b"\r\n"
        downstream = await serve(recorder).ask(CHUNKED.encode())
        for at in range(0, len(sent), step):
            await downstream.send(sent[at : at + step])
        assert (await downstream.read_response()).status == 200
        assert len(recorder.connections[0].request_trailers.get_list("X")) == 100

    async def test_a_hundred_thousand_tiny_chunks(self, serve, recorder):
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(CHUNKED.encode() + b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n")
        assert (await downstream.read_response()).status == 200
        assert recorder.body == b"x" * 100_000


LAST = "Connection: close"
STREAMS = {
    "get": get(LAST),
    "browser": get("Accept: */*", "Cookie: a=b", "Connection: keep-alive, close"),
    "length": head("POST /p HTTP/1.1", "Host: a", "Content-Length: 5", LAST) + b"hello",
    "chunked": head("POST / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked", LAST)
    + b"3;e=1\r\nabc\r\n2\r\nde\r\n0\r\nT: v\r\n\r\n",
    "pipelined": get() + b"\r\n" + head("POST / HTTP/1.1", "Host: a", "Content-Length: 2") + b"ab" + get(LAST),
    "bad": b"GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n",
    "bad chunk": (CHUNKED + "3\r\nabcd\r\n").encode(),
}


class TestSplits:
    @pytest.mark.parametrize("data", STREAMS.values(), ids=STREAMS)
    async def test_the_result_does_not_depend_on_where_the_bytes_are_split(self, serve, recorder, data):
        recorder.on_finish = lambda connection: respond(connection, recorder.body)
        running = serve(recorder)

        async def outcome(split):
            recorder.events.clear()
            downstream = await running.ask(data[:split])
            for _ in range(4):
                # The server, which is on this loop, reads the first part alone.
                await asyncio.sleep(0)
            await downstream.send(data[split:])
            answers = await downstream.read_until_closed()
            downstream.close()
            events = [event for event in recorder.events if event[0] != "data"]
            # Of a body that turns out bad, what came before may have been delivered or not.
            return answers, events, recorder.body if ("finish",) in events else None

        whole = await outcome(len(data))
        for split in range(1, len(data)):
            assert await outcome(split) == whole, split
