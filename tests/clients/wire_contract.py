"""The contract of clients that have a network: each error by its class, and every byte that the upstream sees."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tornado.httputil import HTTPHeaders

from tests.clients.contract import CHUNKED, SECOND, Aborting, Bodies, Heads, Suite, begun
from tests.clients.support import collected, request_for
from tests.support.unreachable import full_backlog
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import within
from tornado_proxy.clients import check_client
from tornado_proxy.errors import (
    BadRequest,
    ConnectError,
    ConnectTimeout,
    InvalidResponse,
    NoUpstreamAvailable,
    ProxyError,
    UpstreamClosed,
)
from tornado_proxy.flow import BodyPipe


async def failure_of(client: Any, request: Any) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        await within(client.send(request), "the failure")
    return caught.value


@contextlib.asynccontextmanager
async def tls_server(certificates: Any, *, cut: bool = False) -> AsyncIterator[str]:
    """Give the URL of a server whose certificate only our own authority vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.chain, certificates.key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n" + (b"" if cut else b"Content-Length: 5\r\n") + b"\r\nhello")
            if not cut:
                await reader.read()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield f"https://localhost:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


class Errors(Suite):
    """Each failure by its class, its phase, and whether it may be tried again."""

    async def test_a_name_that_does_not_resolve(self, client):
        error = await failure_of(client, request_for("GET", "http://nowhere.invalid:1/x"))
        assert isinstance(error, ConnectError)
        assert (error.phase, error.side, error.retry) == ("resolve", "upstream", "always")
        assert error.upstream == "http://nowhere.invalid:1"

    @pytest.mark.parametrize("method", ["GET", "POST"])
    async def test_nothing_listens(self, client, upstream, method):
        upstream.refuse()
        error = await failure_of(client, request_for(method, upstream.url, b"x" if method == "POST" else None))
        assert isinstance(error, ConnectError)
        assert not isinstance(error, ConnectTimeout)
        assert (error.phase, error.status_code, error.upstream) == ("connect", 502, upstream.url)

    async def test_nobody_accepts(self, client):
        async with full_backlog() as url:
            error = await failure_of(client, request_for("GET", url, connect_timeout=0.1))
        assert isinstance(error, ConnectTimeout)
        assert (error.phase, error.status_code) == ("connect", 504)

    async def test_a_certificate_that_nobody_vouches_for(self, client, certificates):
        async with tls_server(certificates) as url:
            error = await failure_of(client, request_for("GET", url))
        assert isinstance(error, ConnectError)
        assert error.phase == "tls"

    async def test_a_certificate_that_is_trusted(self, make_client, certificates):
        client = make_client(ca_certs=str(certificates.root))
        async with tls_server(certificates) as url:
            response = await within(client.send(request_for("GET", url)), "the response")
            assert await response.read() == b"hello"

    async def test_a_body_that_is_cut_under_tls(self, make_client, certificates):
        client = make_client(ca_certs=str(certificates.root))
        async with tls_server(certificates, cut=True) as url:
            response = await within(client.send(request_for("GET", url)), "the response")
            body, error = await within(collected(response), "the end")
        assert body == b"hello"
        assert isinstance(error, UpstreamClosed) if client.capabilities.sees_tls_cut else error is None

    async def test_an_answer_to_an_upload_that_is_refused(self, client, can, upstream):
        pipe = BodyPipe(64 * 1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        conn = await upstream.accept()
        await conn.read_head()
        pipe.write(b"x" * 1024)
        await conn.read_body(1)
        # Closed with the upload unread, so that the connection is reset.
        await conn.respond(413, [("Connection", "close")], b"too large")
        conn.close()
        while not sending.done() and not pipe.ended:
            if (room := pipe.write(b"x" * 1024)) is not None:
                await asyncio.wait([room, sending], timeout=1, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)
        try:
            response = await sending
        except UpstreamClosed:
            # Declared: the answer is looked for only when nothing more can be sent, and then it may be gone.
            assert not can.early_response
        else:
            assert response.status == 413
            response.abort()

    async def test_no_answer(self, client, upstream):
        sending = asyncio.ensure_future(failure_of(client, request_for("GET", upstream.url)))
        conn, _ = await upstream.request()
        conn.close()
        error = await sending
        assert type(error) is UpstreamClosed
        assert (error.phase, error.status_code, error.upstream) == ("head", 502, upstream.url)

    @pytest.mark.parametrize("how", ["reset", "half-a-head"])
    async def test_no_whole_answer(self, client, upstream, how):
        sending = asyncio.ensure_future(failure_of(client, request_for("GET", upstream.url)))
        conn, _ = await upstream.request()
        if how == "reset":
            conn.reset()
        else:
            await conn.send(b"HTTP/1.1 200 OK\r\nContent-")
            conn.close()
        error = await sending
        assert isinstance(error, UpstreamClosed | InvalidResponse)
        assert error.phase == "head"

    @pytest.mark.parametrize("raw", [b"hello\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/1.1 101 Go\r\n\r\n"])
    async def test_an_answer_that_is_none(self, client, upstream, raw):
        sending = asyncio.ensure_future(failure_of(client, request_for("GET", upstream.url)))
        conn, _ = await upstream.request()
        await conn.send(raw)
        error = await sending
        assert type(error) is InvalidResponse
        assert (error.phase, error.status_code) == ("head", 502)
        await within(conn.closed(), "closing", SECOND)

    @pytest.mark.parametrize("framing", ["Content-Length: 10", "Transfer-Encoding: chunked"])
    @pytest.mark.parametrize("how", ["close", "reset"])
    async def test_a_truncated_body(self, client, upstream, framing, how):
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        conn, _ = await upstream.request()
        half = b"half" if "Length" in framing else b"A\r\nhalf"
        await conn.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode() + half)
        response = await within(sending, "the response")
        assert await within(response.stream.read(), "the half") == b"half"
        conn.close() if how == "close" else conn.reset()
        _, error = await within(collected(response), "the failure")
        assert type(error) is UpstreamClosed
        assert error.phase == "body"

    async def test_a_chunk_that_lies(self, client, upstream):
        conn, response = await begun(client, upstream, request_for("GET", upstream.url))
        await conn.send_chunk(b"one")
        assert await within(response.stream.read(), "the first chunk") == b"one"
        await conn.send(b"zzz\r\nno chunk\r\n")
        _, error = await within(collected(response), "the failure")
        assert type(error) is InvalidResponse
        assert error.phase == "body"
        await within(conn.closed(), "closing", SECOND)

    async def test_an_answer_that_the_connection_ends(self, client, upstream):
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
        response = await within(sending, "the response")
        assert await within(response.stream.read(), "the body") == b"hello"
        conn.close()
        assert await within(collected(response), "the end") == (b"", None)

    async def test_no_free_client(self, make_client, upstream):
        client = make_client(max_clients=1)
        first = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        conn, _ = await upstream.request()
        error = await failure_of(client, request_for("GET", upstream.url, connect_timeout=0.05))
        assert type(error) is NoUpstreamAvailable
        await conn.respond(200)
        await (await first).read()


class Wire(Suite):
    """Every byte that the upstream sees, or does not."""

    async def sent(self, client: Any, upstream: Any, request: Any, answer: bytes = b"") -> Any:
        """Send, answer, and return what the upstream saw and the response."""
        sending = asyncio.ensure_future(client.send(request))
        conn, seen = await upstream.request()
        await conn.send(answer or b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        response = await within(sending, "the response")
        await response.read()
        return seen, response

    @pytest.mark.parametrize(
        "target",
        [
            "/a%2fB/../%7e?x=%zz",
            "//a//./b/",
            "/?",
            "/x?a=b?c=/../&d=%",
            "/'\"<>[]{}|^`\\;:@!$&()*+,=",
            "/?'\"<>[]{}|^`\\",
            "/~%7E%41%c3%a9",
        ],
    )
    async def test_the_bytes_of_the_target_are_unchanged(self, client, can, upstream, target):
        assert can.raw_target
        seen, _ = await self.sent(client, upstream, request_for("GET", upstream.url + target))
        assert seen.start_line == f"GET {target} HTTP/1.1"

    async def test_an_empty_path_is_a_slash(self, client, upstream):
        seen, _ = await self.sent(client, upstream, request_for("GET", upstream.url + "?x=1"))
        assert seen.target == "/?x=1"

    async def test_raw_bytes_in_a_target(self, client, can, upstream):
        request = request_for("GET", upstream.url + "/\xff\xfe?\xe9")
        if can.eight_bit_target:
            seen, _ = await self.sent(client, upstream, request)
            assert seen.target == "/\xff\xfe?\xe9"
        else:
            assert isinstance(await failure_of(client, request), BadRequest)

    async def test_raw_bytes_in_a_field(self, client, can, upstream):
        request = request_for("GET", upstream.url, headers=[("X-A", "\xff\xe9")])
        if can.eight_bit_fields:
            seen, _ = await self.sent(client, upstream, request)
            assert seen.header("X-A") == "\xff\xe9"
        else:
            assert isinstance(await failure_of(client, request), BadRequest)

    @pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS", "PROPFIND", "get"])
    async def test_no_field_is_invented(self, client, upstream, method):
        seen, _ = await self.sent(client, upstream, request_for(method, upstream.url + "/x"))
        assert seen.raw == f"{method} /x HTTP/1.1\r\nHost: 127.0.0.1:{upstream.port}\r\n\r\n".encode()

    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "GET"])
    async def test_nor_with_a_body(self, client, upstream, method):
        seen, _ = await self.sent(client, upstream, request_for(method, upstream.url + "/x", b"hello"))
        assert sorted(seen.names) == ["content-length", "host"]

    async def test_order_and_values_of_fields_are_kept(self, client, upstream):
        fields = [
            ("X-B", "2"),
            ("Accept-Encoding", "br;q=1.0, gzip"),
            ("X-A", "1"),
            ("Cookie", "a=b; c=d"),
            ("User-Agent", "me"),
            ("X-B", "3"),
            ("X-Empty", ""),
            ("Content-Type", "text/x"),
            ("Accept", "*/*"),
            ("X-Utf8", "caf\u00c3\u00a9"),
            ("Authorization", "Basic eDp5"),
            ("Te", "trailers"),
        ]
        request = request_for("GET", upstream.url, headers=fields)
        seen, _ = await self.sent(client, upstream, request)
        assert seen.headers[0] == ("Host", f"127.0.0.1:{upstream.port}")
        # HTTPHeaders puts the lines of one name together.
        assert seen.headers[1:] == list(request.headers.get_all())

    async def test_host_is_as_given(self, client, upstream):
        request = request_for("GET", upstream.url, headers=[("X-A", "1"), ("Host", "Other.example:81")])
        seen, _ = await self.sent(client, upstream, request)
        assert seen.headers == [("Host", "Other.example:81"), ("X-A", "1")]

    async def test_redirects_are_not_followed(self, client, upstream):
        answer = b"HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n"
        _, response = await self.sent(client, upstream, request_for("GET", upstream.url), answer)
        assert (response.status, response.headers["Location"]) == (302, "/y")
        assert upstream.accepted == 1

    @pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
    async def test_nothing_is_decompressed(self, client, upstream, coding):
        body = gzip.compress(b"hello")
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nContent-Length: {len(body)}\r\n\r\n"
        _, response = await self.sent(client, upstream, request_for("GET", upstream.url), head.encode() + body)
        assert response.headers["Content-Encoding"] == coding
        assert response.body == body

    async def test_cookies_are_not_kept(self, client, upstream):
        answer = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Path=/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        await self.sent(client, upstream, request_for("GET", upstream.url), answer)
        seen, _ = await self.sent(client, upstream, request_for("GET", upstream.url))
        assert not seen.has("Cookie")

    async def test_an_error_status_is_a_response(self, client, upstream):
        answer = b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\nWWW-Authenticate: Basic\r\n\r\nno"
        _, response = await self.sent(client, upstream, request_for("GET", upstream.url), answer)
        assert (response.status, response.reason, response.body) == (503, "Busy", b"no")

    async def test_nothing_comes_from_the_environment(self, make_client, upstream, monkeypatch, tmp_path):
        netrc = tmp_path / ".netrc"
        netrc.write_text("machine 127.0.0.1 login me password secret\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        seen, _ = await self.sent(make_client(), upstream, request_for("GET", upstream.url + "/x"))
        assert seen.raw == f"GET /x HTTP/1.1\r\nHost: 127.0.0.1:{upstream.port}\r\n\r\n".encode()

    async def test_trailers_stand_by_themselves(self, client, can, upstream):
        conn, response = await begun(client, upstream, request_for("GET", upstream.url))
        await conn.send(b"3;ext=1\r\none\r\n")
        assert await within(response.stream.read(), "the body") == b"one"
        assert list(response.trailers.get_all()) == []
        await conn.send(b"0\r\nX-Trailer: late\r\nX-Trailer:  later \r\nConnection: x-a\r\n")
        await conn.send(b"X-A: 1\r\nSet-Cookie: a=1\r\n\r\n")
        assert await within(collected(response), "the end") == (b"", None)
        assert "X-Trailer" not in response.headers
        assert "Set-Cookie" not in response.headers
        expected = [("X-Trailer", "late"), ("X-Trailer", "later")] if can.trailers else []
        assert list(response.trailers.get_all()) == expected

    @pytest.mark.parametrize("body", [b"", b"hello", b"x" * 300_000], ids=["empty", "small", "large"])
    async def test_trailers_follow_an_upload_of_unknown_length(self, client, can, upstream, body):
        """And none of them follow the next one, which may go by the same connection and handle."""
        many = [(f"X-{number}", "y" * 150) for number in range(100)]
        conn = None
        for fields in ([("X-A", "1"), ("X-A", ""), ("X-B", "caf\u00c3\u00a9")], [], many, []):
            pipe = BodyPipe(1024 * 1024)
            sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
            if conn is None or not can.keep_alive:
                conn = await upstream.accept()
            head = await conn.read_head()
            assert not head.has("Trailer")
            pipe.write(body)
            if fields:
                pipe.trailers = HTTPHeaders()
                for name, value in fields:
                    pipe.trailers.add(name, value)
            pipe.close()
            seen = b""
            while len(seen) < len(body):
                seen += await conn.read_chunk()
            assert seen == body
            lines = [f"{name}: {value}\r\n".encode("latin-1") for name, value in fields if can.request_trailers]
            expected = b"".join([b"0\r\n", *lines, b"\r\n"])
            assert await conn.read_exactly(len(expected)) == expected
            await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            assert await within(collected(await within(sending, "the response")), "the body") == (b"", None)

    async def test_a_body_of_known_length_has_no_trailers(self, client, upstream):
        pipe = BodyPipe(1024, 5)
        pipe.write(b"hello")
        pipe.trailers = HTTPHeaders({"X-A": "1"})
        pipe.close()
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        conn, seen = await upstream.request()
        assert (seen.content_length, seen.body) == (5, b"hello")
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        assert (await within(sending, "the response")).status == 200
        # Not a byte more.
        client.close()
        assert await conn.read_until_closed() == b""

    async def test_http_1_0_is_told(self, client, upstream):
        answer = b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"
        _, response = await self.sent(client, upstream, request_for("GET", upstream.url), answer)
        assert response.version == "HTTP/1.0"

    async def test_large_fields_pass(self, client, upstream):
        answer = b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 30000 + b"\r\nContent-Length: 0\r\n\r\n"
        request = request_for("GET", upstream.url + "/" + "x" * 30000, headers=[("X-B", "b" * 30000)])
        seen, response = await self.sent(client, upstream, request, answer)
        assert len(seen.header("X-B")) == len(response.headers["X-A"]) == 30000

    async def test_a_body_is_asked_for(self, client, can, upstream):
        pipe = BodyPipe(1024, 5)
        told: list[int] = []

        def on_interim(status: int, _reason: str, _headers: Any) -> None:
            told.append(status)
            pipe.write(b"hello")
            pipe.close()

        request = request_for("POST", upstream.url, pipe, expect_continue=True, on_interim=on_interim)
        sending = asyncio.ensure_future(client.send(request))
        conn = await upstream.accept()
        head = await conn.read_head()
        if can.expect_continue:
            assert head.header("Expect") == "100-continue"
            assert told == []
            await conn.send_head(100)
        else:
            assert not head.has("Expect")
        # By the upstream's word, or at once: either way the downstream is told, once.
        assert await conn.read_body() == b"hello"
        await conn.respond(200)
        await (await within(sending, "the response")).read()
        assert told == [100]

    async def test_a_body_that_is_not_wanted_stays(self, client, can, upstream):
        if not can.expect_continue:
            pytest.skip("declared: does not ask")
        pipe = BodyPipe(1024, 5)
        told: list[Any] = []
        request = request_for(
            "POST", upstream.url, pipe, expect_continue=True, on_interim=lambda *args: told.append(args)
        )
        sending = asyncio.ensure_future(client.send(request))
        conn = await upstream.accept()
        await conn.read_head()
        await conn.respond(403, [], b"no")
        response = await within(sending, "the response")
        assert response.status == 403
        assert told == []
        response.abort()


class Connections(Suite):
    """Which connection a request goes out on."""

    async def one(self, client: Any, upstream: Any, method: str = "GET", **more: Any) -> None:
        await (await within(client.send(request_for(method, upstream.url, **more)), "the response")).read()

    async def test_connections_are_kept_or_not_as_declared(self, client, can, upstream):
        upstream.serve(lambda conn, request: conn.respond(200, [], b"hello"))
        for _ in range(3):
            await self.one(client, upstream)
        assert upstream.accepted == (1 if can.keep_alive else 3)

    async def test_a_fresh_one_where_asked_for(self, client, can, upstream):
        upstream.serve(lambda conn, request: conn.respond(200, [], b"hello"))
        await self.one(client, upstream)
        await self.one(client, upstream, fresh_connection=True)
        assert upstream.accepted == (2 if can.fresh_connection else 1)

    async def test_a_unix_socket(self, make_client, can, tmp_path):
        assert can.unix_socket
        path = tmp_path / "socket"
        async with ScriptedUpstream(unix_socket=path) as upstream:
            client = make_client(unix_socket=str(path))
            sending = asyncio.ensure_future(client.send(request_for("GET", "http://localhost/x")))
            conn, request = await upstream.request()
            assert request.raw == b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n"
            await conn.respond(200, [], b"hello")
            assert await (await within(sending, "the response")).read() == b"hello"

    async def test_an_unasked_answer_is_nobodys(self, client, upstream):
        conn, response = await begun(client, upstream, request_for("GET", upstream.url), [("Content-Length", "0")])
        await response.read()
        poison = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
        with contextlib.suppress(ConnectionError):
            await conn.send(poison)
        # It has arrived, and whoever watches has seen it.
        await asyncio.sleep(0.05)
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        await asyncio.wait([sending], timeout=0.1)
        if not sending.done():
            other, _ = await upstream.request()
            await other.respond(200, [], b"honest")
        # An answer to what was asked, or an error that lets the forwarder ask again on another connection.
        done = (await asyncio.gather(sending, return_exceptions=True))[0]
        if isinstance(done, UpstreamClosed):
            assert done.retry in ("always", "if-idempotent")
        else:
            assert await done.read() == b"honest"

    @pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE"])
    async def test_a_request_is_sent_once(self, client, can, upstream, method):
        if not can.keep_alive:
            pytest.skip("declared: no connection is used twice")
        conn, response = await begun(client, upstream, request_for("GET", upstream.url), [("Content-Length", "0")])
        await response.read()
        sending = asyncio.ensure_future(client.send(request_for(method, upstream.url + "/again")))
        await conn.read_request()
        conn.close()
        with pytest.raises(UpstreamClosed):
            await within(sending, "the failure")
        # libcurl makes another connection before it asks whether it may send, which is refused.
        assert [await other.read_until_closed() for other in upstream.connections[1:]] in ([], [b""])


class Declared(Suite):
    """What is missing is said at start-up."""

    @pytest.mark.parametrize("version", ["2", "2-prior-knowledge", "3"])
    async def test_a_version_that_it_cannot_speak(self, client, can, version):
        if can.http3 if version == "3" else can.http2:
            return
        with pytest.raises(ValueError, match=rf"client_options: http_version '{version}' .*; write client='curl'"):
            check_client(type(client), {"http_version": version})

    async def test_an_option_that_it_does_not_know(self, client):
        with pytest.raises(ValueError, match=r"client_options: 'color' is not known to the \w+ client; it knows "):
            check_client(type(client), {"color": "red"})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ca_certs": "/nowhere"}, "cannot be read"),
            ({"validate_cert": "no"}, "True or False"),
            ({"max_clients": 0}, "positive"),
            ({"http_version": "9"}, "http_version '9'"),
        ],
    )
    async def test_an_option_that_is_wrong(self, client, options, message):
        with pytest.raises(ValueError, match=rf"client_options: .*{message}"):
            check_client(type(client), options)


class Contract(Heads, Bodies, Aborting, Errors, Wire, Connections, Declared):
    """All of it."""


__all__ = ["CHUNKED", "Contract"]
