"""Interim responses pass end to end, and Max-Forwards is kept (RFC 9110 sections 15.2, 7.6.2)."""

import pytest


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
