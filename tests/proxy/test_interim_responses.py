"""Expectations and interim responses pass end to end; Max-Forwards is kept (RFC 9110 sections 10.1.1, 15.2, 7.6.2)."""

import pytest

from tests.support.wire import chunk

EXPECT = [("Expect", "100-continue"), ("Content-Length", "5")]


class TestExpectations:
    """The upstream decides whether the body is sent: nobody says 100 in its place."""

    @pytest.mark.parametrize("spelling", ["100-continue", "100-Continue", "a-miracle, 100-continue"])
    async def test_the_upstreams_100_lets_the_body_come(self, proxy, upstream, spelling):
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", [("Expect", spelling), ("Content-Length", "5")])
        conn = await upstream.accept()
        assert (await conn.read_head()).header("Expect") == "100-continue"
        # Nothing but the upstream can have caused this one: it comes only now.
        await conn.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert (await downstream.read_head()).start_line == "HTTP/1.1 100 Continue"
        await downstream.send(b"hello")
        assert await conn.read_body() == b"hello"
        await conn.respond(200, body=b"ok")
        response = await downstream.read_response()
        assert (response.status, response.body, response.interim) == (200, b"ok", [])

    async def test_a_chunked_body_too(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("PUT", "/x", [("Expect", "100-continue"), ("Transfer-Encoding", "chunked")])
        conn = await upstream.accept()
        await conn.read_head()
        await conn.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert (await downstream.read_head()).status == 100
        await downstream.send(chunk(b"hello") + b"0\r\n\r\n")
        assert await conn.read_body() == b"hello"
        await conn.respond(200)
        assert (await downstream.read_response()).status == 200

    @pytest.mark.parametrize("status", [401, 413, 417])
    async def test_a_refusal_comes_instead_of_100_and_the_body_is_never_sent(self, proxy, upstream, status):
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", EXPECT)
        conn = await upstream.accept()
        await conn.read_head()
        await conn.respond(status, [("X-A", "1")], body=b"")
        response = await downstream.read_response()
        assert (response.status, response.interim, response.header("X-A")) == (status, [], "1")
        # Whether the body still comes cannot be told from a next request, so there is none.
        assert response.header("Connection") == "close"
        await downstream.closed()
        assert await conn.closed()
        assert (await running.next_outcome()).bytes_up == 0
        assert upstream.accepted == 1

    async def test_an_upstream_that_knows_no_expectations_gets_the_body_after_a_second(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", EXPECT)
        conn = await upstream.accept()
        await conn.read_head()
        assert (await downstream.read_head()).status == 100
        await downstream.send(b"hello")
        assert await conn.read_body() == b"hello"
        await conn.respond(200)
        assert (await downstream.read_response()).status == 200

    async def test_who_does_not_wait_is_not_told(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", EXPECT, b"hello")
        conn = await upstream.accept()
        await conn.read_head()
        await conn.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await conn.read_body() == b"hello"
        await conn.respond(200)
        response = await downstream.read_response()
        assert (response.status, response.interim) == (200, [])
        # The connection is as good as after any other request.
        await downstream.request("GET", "/y")
        assert (await conn.read_request()).target == "/y"
        await conn.respond(200)
        assert (await downstream.read_response()).status == 200

    @pytest.mark.parametrize(
        "request_head",
        [
            b"POST /x HTTP/1.0\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
            b"POST /x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n",
            b"GET /x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n\r\n",
            b"POST /x HTTP/1.1\r\nHost: h\r\nExpect: a-miracle\r\nContent-Length: 5\r\n\r\nhello",
        ],
    )
    async def test_an_expectation_that_means_nothing_goes_no_further(self, proxy, upstream, request_head):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(request_head)
        conn, request = await upstream.request()
        assert not request.has("Expect")
        await conn.respond(200, body=b"ok")
        response = await downstream.read_response()
        assert (response.status, response.interim) == (200, [])

    async def test_no_body_that_is_too_large_is_asked_for(self, proxy, upstream):
        running = await proxy(upstream.url, max_body_size=4)
        downstream = await running.ask("POST", "/x", EXPECT)
        response = await downstream.read_response()
        assert (response.status, response.interim) == (413, [])
        assert upstream.accepted == 0


class TestInterimResponses:
    """What the upstream says before its answer reaches those who understand it."""

    async def test_early_hints_come_before_the_answer_is_there(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nLink: </b>\r\nKeep-Alive: 5\r\n\r\n")
        hints = await downstream.read_head()
        assert hints.start_line == "HTTP/1.1 103 Early Hints"
        assert hints.headers == [("Link", "</a>"), ("Link", "</b>")]
        await conn.respond(200, body=b"ok")
        response = await downstream.read_response()
        assert (response.status, response.body, response.has("Link")) == (200, b"ok", False)

    async def test_not_to_a_client_of_http_1_0(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(b"GET /x HTTP/1.0\r\nHost: h\r\n\r\n")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        await conn.respond(200, body=b"ok")
        response = await downstream.read_response()
        assert (response.status, response.interim) == (200, [])

    async def test_a_100_that_nobody_waits_for_goes_no_further(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", body=b"hello")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await conn.respond(200, body=b"ok")
        response = await downstream.read_response()
        assert (response.status, response.interim) == (200, [])

    async def test_too_many_are_no_answer(self, proxy, upstream, expect_log):
        expect_log("too many interim")
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 21)
        assert (await downstream.read_response()).status == 502


class TestMaxForwards:
    """RFC 9110 section 7.6.2: OPTIONS and TRACE go so far and no further."""

    @pytest.mark.parametrize(("method", "status"), [("OPTIONS", 200), ("TRACE", 405)])
    async def test_the_last_to_be_reached_is_us(self, proxy, upstream, method, status):
        running = await proxy(upstream.url)
        response = await running.request(method, "/x", [("Max-Forwards", "0"), ("Cookie", "s=1")])
        assert response.status == status
        assert b"s=1" not in response.raw
        assert upstream.accepted == 0
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.error) == (status, None)

    async def test_an_answer_of_ours_names_the_methods(self, proxy, upstream):
        running = await proxy(upstream.url, custom_http_methods=["PURGE"])
        response = await running.request("OPTIONS", "/x", [("Max-Forwards", "0")])
        assert response.header("Allow") == "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PURGE, PUT, TRACE"

    @pytest.mark.parametrize(
        ("method", "given", "sent"),
        [("OPTIONS", "5", "4"), ("TRACE", "1", "0"), ("GET", "0", "0"), ("OPTIONS", "many", "many")],
    )
    async def test_it_counts_down(self, proxy, echo, method, given, sent):
        running = await proxy(echo.url)
        assert (await running.request(method, "/x", [("Max-Forwards", given)])).status == 200
        assert echo.requests[-1].header("Max-Forwards") == sent
