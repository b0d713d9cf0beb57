"""Options that no other file is about, each with another value than its default; and that none is forgotten."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.process import free_port
from tests.support.wire import chunk
from tornado_proxy import ProxyOptions

CHUNKED = [("Transfer-Encoding", "chunked")]
MODES = pytest.mark.parametrize("mode", ["stream", "buffer"])
# The work on upgrades brings the tests of these.
TUNNELS = {"websocket", "allowed_origins", "tunnel_idle_timeout"}


class TestAll:
    """Another file that drives a proxy over sockets says the name of each option, with a value."""

    @pytest.mark.parametrize("name", sorted({field.name for field in dataclasses.fields(ProxyOptions) if field.init}))
    def test_every_option_is_given_somewhere(self, name):
        if name in TUNNELS:
            pytest.skip("upgrades are tested with the tunnels")
        if name == "upstream":
            return  # by every test
        tests = Path(__file__).parents[1]
        texts = [file.read_text("utf-8") for part in ("proxy", "real") for file in tests.glob(f"{part}/*.py")]
        # name=value, "name": value, --name value, or made of its mode: f"{mode}_headers_mode"
        said = rf"\b{name}=|\"{name}\":|\"--(no-)?{name.replace('_', '-')}\"|{{mode}}_{name.partition('_')[2]}\":"
        assert any(re.search(said, text) for text in texts)


def shout(handler, data: bytes) -> bytes:
    return data.upper()


async def shout_later(handler, data: bytes) -> bytes:
    await asyncio.sleep(0)
    return data.upper()


FILTERS = pytest.mark.parametrize("function", [shout, shout_later], ids=["sync", "async"])


class TestFilterRequestBody:
    @FILTERS
    @pytest.mark.parametrize("framing", ["length", "chunked"])
    async def test_changes_the_body_whose_length_is_not_announced(self, proxy, echo, function, framing):
        running = await proxy(echo.url, filter_request_body=function)
        if framing == "length":
            response = await running.request("POST", "/x", body=b"one two")
        else:
            response = await running.request("POST", "/x", CHUNKED, chunk(b"one ") + chunk(b"two") + b"0\r\n\r\n")
        assert response.status == 200
        request = echo.requests[-1]
        assert (request.body, request.chunked, request.content_length) == (b"ONE TWO", True, None)

    @FILTERS
    async def test_sees_each_chunk_as_it_comes(self, proxy, upstream, function):
        """The test holds the second chunk until the upstream has the first."""
        running = await proxy(upstream.url, filter_request_body=function)
        downstream = await running.ask("POST", "/x", CHUNKED)
        conn = await upstream.accept()
        await conn.read_head()
        for part in (b"one", b"two"):
            await downstream.send(chunk(part))
            assert await conn.read_body(3) == part.upper()
        await downstream.send(b"0\r\n\r\n")
        assert await conn.read_body() == b""
        await conn.respond(204)
        assert (await downstream.read_response()).status == 204

    async def test_may_drop_what_it_likes(self, proxy, echo):
        running = await proxy(echo.url, filter_request_body=lambda handler, data: b"")
        assert (await running.request("POST", "/x", body=b"secret")).status == 200
        assert echo.requests[-1].body == b""

    async def test_that_raises_ends_the_exchange_with_500(self, proxy, upstream, expect_log):
        expect_log(r"filter_request_body raised.*ZeroDivisionError")
        running = await proxy(upstream.url, filter_request_body=lambda handler, data: 1 // 0)
        assert (await running.request("POST", "/x", body=b"abc")).status == 500
        assert (await running.next_outcome()).side == "proxy"


class TestFilterResponseBody:
    @MODES
    @FILTERS
    @pytest.mark.parametrize("framing", ["length", "chunked"])
    async def test_changes_the_body_and_frames_it_anew(self, proxy, upstream, mode, function, framing):
        def longer(handler, data):
            return function(handler, data + b"!") if data else data

        running = await proxy(upstream.url, response_mode=mode, filter_response_body=longer)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        if framing == "length":
            await conn.respond(200, body=b"one")
        else:
            await conn.respond(200, CHUNKED, chunk(b"one") + b"0\r\n\r\n")
        response = await downstream.read_response()
        assert (response.body, response.complete) == (b"ONE!", True)
        assert response.content_length == (None if mode == "stream" else 4)
        await downstream.request("GET", "/y")
        await conn.read_request()
        await conn.respond(200, body=b"two")
        assert (await downstream.read_response()).body == b"TWO!"

    @FILTERS
    async def test_sees_each_chunk_as_it_comes(self, proxy, upstream, function):
        running = await proxy(upstream.url, filter_response_body=function)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        for part in (b"one", b"two"):
            await conn.send_chunk(part)
            if part == b"one":
                await downstream.read_head()
            assert await downstream.read_body(3) == part.upper()
        await conn.send_chunk(b"")
        assert await downstream.read_body() == b""

    async def test_that_raises_cuts_the_response_short(self, proxy, upstream, expect_log):
        expect_log("ZeroDivisionError")
        running = await proxy(upstream.url, filter_response_body=lambda handler, data: data if data.strip() else 1 // 0)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        await downstream.read_head()
        await conn.send_chunk(b" ")
        await downstream.closed()
        assert b"0\r\n\r\n" not in await downstream.read_until_closed()


class TestShouldRetry:
    @pytest.mark.parametrize(
        ("answer", "status", "attempts"), [(None, 200, 2), (True, 200, 2), (False, 502, 1)], ids=["none", "yes", "no"]
    )
    async def test_decides_where_another_attempt_is_safe(self, proxy, echo, expect_log, answer, status, attempts):
        expect_log("refused|Could not connect", required=False)
        urls = iter([f"http://127.0.0.1:{free_port()}", echo.url])
        asked = []

        def should_retry(handler, error):
            asked.append(error.phase)
            return answer

        running = await proxy(lambda: next(urls), should_retry=should_retry)
        assert (await running.get("/x")).status == status
        assert asked == ["connect"]
        assert (await running.next_outcome()).attempts == attempts


class TestMaxBodySize:
    async def test_a_body_of_that_size_passes(self, proxy, echo):
        running = await proxy(echo.url, max_body_size=5)
        for headers, body in (([], b"12345"), (CHUNKED, chunk(b"123") + chunk(b"45") + b"0\r\n\r\n")):
            assert (await running.request("POST", "/x", headers, body)).status == 200
            assert echo.requests[-1].body == b"12345"

    async def test_one_that_says_it_is_larger_is_refused_at_once(self, proxy, upstream):
        running = await proxy(upstream.url, max_body_size=5)
        downstream = await running.connect()
        await downstream.send(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 6\r\n\r\n")
        assert (await downstream.read_response()).status == 413
        assert upstream.accepted == 0
        assert (await running.next_outcome()).status == 413

    async def test_one_that_turns_out_to_be_larger_is_cut_off(self, proxy, upstream):
        running = await proxy(upstream.url, max_body_size=5)
        downstream = await running.ask("POST", "/x", CHUNKED)
        await downstream.send(chunk(b"123"))
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_body(3) == b"123"
        await downstream.send(chunk(b"456"))
        assert (await downstream.read_response()).status == 413
        # The upstream must not take what it has for a whole body.
        assert b"0\r\n\r\n" not in await conn.read_until_closed()


REFERENCES = [
    ("Location", "/bar/next"),
    ("Content-Location", "/bar/here"),
    ("Refresh", "5; url=/bar/later"),
    ("Set-Cookie", "a=b; Path=/bar/in; Domain=up.example; HttpOnly"),
]


class TestReferences:
    async def references(self, proxy, upstream, **options):
        running = await proxy(f"{upstream.url}/bar", prefix="/foo", **options)
        downstream = await running.ask("GET", "/foo/x")
        conn, _ = await upstream.request()
        await conn.respond(201, [*REFERENCES, ("Content-Length", "0")])
        response = await downstream.read_response()
        return [(name, response.header(name)) for name, _ in REFERENCES]

    async def test_come_back_under_the_mount(self, proxy, upstream):
        assert await self.references(proxy, upstream) == [
            ("Location", "/foo/next"),
            ("Content-Location", "/foo/here"),
            ("Refresh", "5; url=/foo/later"),
            ("Set-Cookie", "a=b; Path=/foo/in; Domain=up.example; HttpOnly"),
        ]

    async def test_pass_as_they_came_without_rewrite_location(self, proxy, upstream):
        assert await self.references(proxy, upstream, rewrite_location=False) == REFERENCES

    async def test_cookie_domain_and_cookie_path_replace_the_attributes(self, proxy, upstream):
        found = await self.references(
            proxy, upstream, rewrite_location=False, cookie_domain="front.example", cookie_path="/all"
        )
        assert found[-1] == ("Set-Cookie", "a=b; Path=/all; Domain=front.example; HttpOnly")

    @pytest.mark.parametrize(
        ("head", "location"),
        [
            (
                b"GET http://named.example:81/x HTTP/1.1\r\nHost: ignored.example\r\n\r\n",
                "http://named.example:81/next",
            ),
            (b"GET /x HTTP/1.1\r\nHost: front.example\r\n\r\n", "http://front.example/next"),
            (b"GET /x HTTP/1.1\r\nHost:\r\n\r\n", "/next"),
            (b"GET /x HTTP/1.0\r\n\r\n", "/next"),
        ],
        ids=["absolute-form", "Host", "empty Host", "no Host"],
    )
    async def test_name_the_host_that_was_asked_for(self, proxy, upstream, head, location):
        """RFC 9112 section 3.2.2. Where none was named, none is made up, for the upstream neither."""
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(head)
        conn, request = await upstream.request()
        host = location.removeprefix("http://").removesuffix("/next")
        assert request.all("X-Forwarded-Host") == ([host] if host else [])
        await conn.respond(302, [("Location", f"{upstream.url}/next"), ("Content-Length", "0")])
        assert (await downstream.read_response()).header("Location") == location


class TestUpstreamTls:
    """``client_options`` for an https upstream, with a real chain of certificates."""

    @pytest.fixture
    async def secure(self, certificates) -> AsyncIterator[Callable]:
        """Start an https upstream that answers with what it knows of the client's certificate."""
        servers = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.readuntil(b"\r\n\r\n")
                subject = (writer.get_extra_info("peercert") or {}).get("subject", ())
                body = repr(subject).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()
                await reader.read()
            except (asyncio.IncompleteReadError, OSError):
                pass  # the proxy does not trust us, or hung up
            finally:
                writer.close()

        async def start(*, chain: Path | None = None, demands: bool = False, host: str = "127.0.0.1") -> str:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.root)
            context.load_cert_chain(chain or certificates.chain, certificates.key)
            if demands:
                context.verify_mode = ssl.CERT_REQUIRED
            server = await asyncio.start_server(answer, host, 0, ssl=context)
            servers.append(server)
            return f"https://{host}:{server.sockets[0].getsockname()[1]}"

        yield start
        for server in servers:
            server.close()

    async def get(self, proxy, url: str, **client_options: object):
        running = await proxy(url, client_options=client_options)
        response = await running.get("/x")
        return SimpleNamespace(status=response.status, body=response.body, outcome=await running.next_outcome())

    async def test_a_chain_whose_root_is_trusted_is_good(self, proxy, secure, certificates):
        found = await self.get(proxy, await secure(), ca_certs=str(certificates.root))
        assert (found.status, found.body) == (200, b"()")

    @pytest.mark.parametrize("case", ["unknown root", "no intermediate", "other name"])
    async def test_anything_else_is_not(self, proxy, secure, certificates, expect_log, case):
        expect_log("certificate")
        url = await secure(
            chain=certificates.alone if case == "no intermediate" else None,
            # An address for which its certificate is not.
            host="127.0.0.2" if case == "other name" else "127.0.0.1",
        )
        options = {} if case == "unknown root" else {"ca_certs": str(certificates.root)}
        found = await self.get(proxy, url, **options)
        assert found.status == 502
        assert (found.outcome.side, found.outcome.phase) == ("upstream", "tls")
        assert b"certificate" not in found.body

    async def test_unless_nobody_looks(self, proxy, secure):
        assert (await self.get(proxy, await secure(), validate_cert=False)).status == 200

    async def test_our_own_certificate_is_shown_to_who_demands_it(self, proxy, secure, certificates, expect_log):
        url = await secure(demands=True)
        shown = {"client_cert": str(certificates.chain), "client_key": str(certificates.key)}
        found = await self.get(proxy, url, ca_certs=str(certificates.root), **shown)
        assert (found.status, found.body) == (200, b"((('commonName', 'test server'),),)")
        expect_log("/x")
        assert (await self.get(proxy, url, ca_certs=str(certificates.root))).status == 502
