"""What the seed asserts of each of its adapters, asserted of ours, without a proxy around them."""

import asyncio

import pytest
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine

from tests.support.unreachable import nothing_listens
from tornado_proxy.clients.curl import CurlClient
from tornado_proxy.errors import ConnectError, UpstreamTimeout
from tornado_proxy.messages import UpstreamRequest

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]


def request_for(method, url, body=None, **headers):
    start_line = RequestStartLine(method, "/", "HTTP/1.1")
    inbound = HTTPServerRequest(start_line=start_line, headers=HTTPHeaders({"Host": "front.example"}))
    return UpstreamRequest(method=method, url=url, headers=HTTPHeaders(headers), body=body, inbound=inbound)


@pytest.fixture(params=[CurlClient])
async def client(request):
    client = request.param()
    yield client
    client.close()


class TestAdapters:
    """The seed's paragraph on adapters, for each client of ours."""

    @pytest.mark.parametrize("method", METHODS)
    async def test_a_response(self, client, echo, method):
        body = b"hello" if method in ("POST", "PUT", "PATCH") else None
        response = await client.send(request_for(method, f"{echo.url}/x?y=1", body))
        assert (response.status, response.reason, response.upstream) == (200, "OK", echo.url)
        assert response.headers["Content-Type"] == "application/json"
        data = await response.read()
        assert bool(data) == (method != "HEAD")
        assert echo.requests[-1].start_line == f"{method} /x?y=1 HTTP/1.1"
        assert echo.requests[-1].body == (body or b"")

    @pytest.mark.parametrize("method", METHODS)
    async def test_nothing_listens(self, client, method):
        with nothing_listens() as url, pytest.raises(ConnectError) as caught:
            await client.send(request_for(method, url))
        assert (caught.value.phase, caught.value.upstream) == ("connect", url)

    @pytest.mark.parametrize("method", METHODS)
    async def test_the_response_is_there_before_its_body(self, client, upstream, method):
        sending = asyncio.ensure_future(client.send(request_for(method, upstream.url)))
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Content-Length", "3")])
        # The upstream holds the body until the response was returned.
        response = await asyncio.wait_for(sending, 5)
        if method != "HEAD":
            await conn.send(b"one")
        assert await response.read() == (b"" if method == "HEAD" else b"one")

    async def test_204_has_no_chunk(self, client, upstream):
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        conn, _ = await upstream.request()
        await conn.respond(204, [("X-One", "1")])
        response = await sending
        assert (response.status, response.headers.get_list("X-One")) == (204, ["1"])
        assert [part async for part in response] == []

    async def test_two_set_cookies_stay_two(self, client, upstream):
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        conn, _ = await upstream.request()
        await conn.respond(200, [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")])
        response = await sending
        assert response.headers.get_list("Set-Cookie") == ["a=1", "b=2"]
        await response.read()


class TestTimeoutIsAnError:
    """A silent upstream surfaces as an error whichever client is used; the forwarder keeps the clock."""

    @pytest.mark.parametrize("client", ["curl"])
    async def test_no_response(self, proxy, upstream, client, expect_log):
        expect_log("upstream")
        errors = []
        running = await proxy(upstream.url, client=client, response_timeout=0.1, error_callback=errors.append)
        assert (await running.get("/x")).status == 504
        assert [type(error) for error in errors] == [UpstreamTimeout]

    @pytest.mark.parametrize("client", ["curl"])
    async def test_no_more_of_the_body(self, proxy, upstream, client, expect_log):
        expect_log("upstream")
        errors = []
        running = await proxy(upstream.url, client=client, idle_timeout=0.1, error_callback=errors.append)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        response = await downstream.read_response()
        assert (response.status, response.complete) == (200, False)
        await conn.closed()
        assert [type(error) for error in errors] == [UpstreamTimeout]
