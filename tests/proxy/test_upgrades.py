"""A websocket handshake goes upstream first; a valid 101 makes a tunnel, and all else is a response like any other.

The scenarios that a tunnel must survive are named by their ids; see ``tests/README.md``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from tornado.web import HTTPError

from tests.support.flooding import HELD, KERNEL, MIB, Sender
from tests.support.websocket import ASK, ASKING, GRANT, GRANTING, KEY, opened
from tests.support.wire import until
from tornado_proxy import ProxyHandler, tunnel
from tornado_proxy.handshake import accept_value


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Most tests leave one end open, which nobody has to wait for."""
    monkeypatch.setattr(tunnel, "HALF_CLOSED", 0.3)


class TestTheHandshake:
    async def test_goes_upstream_as_it_came_with_our_own_fields(self, proxy, upstream):
        running = await proxy(upstream.url + "/base", prefix="/app")
        await running.ask(
            "GET",
            "/app/chat?x=%2F",
            [
                *ASK,
                ("Sec-WebSocket-Protocol", "a, b"),
                ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits"),
                ("Origin", "http://evil"),
                ("Cookie", "c=1"),
                ("X-Own", "1"),
                ("X-Own", "2"),
                ("X-Forwarded-For", "203.0.113.9"),
            ],
        )
        _, request = await upstream.request()
        assert (request.method, request.target, request.version) == ("GET", "/base/chat?x=%2F", "HTTP/1.1")
        assert request.header("Host") == f"127.0.0.1:{upstream.port}"
        assert (request.header("Connection"), request.header("Upgrade")) == ("Upgrade", "websocket")
        assert request.header("Sec-WebSocket-Key") == KEY
        assert request.header("Sec-WebSocket-Version") == "13"
        assert request.header("Sec-WebSocket-Protocol") == "a, b"
        assert request.header("Sec-WebSocket-Extensions") == "permessage-deflate; client_max_window_bits"
        assert request.header("Origin") == "http://evil"
        assert request.header("Cookie") == "c=1"
        assert request.all("X-Own") == ["1", "2"]
        assert request.header("X-Forwarded-For") == "127.0.0.1"
        assert request.header("X-Forwarded-Prefix") == "/app"
        assert request.header("Via") == "1.1 tornado_proxy"
        assert not {"content-length", "transfer-encoding"} & set(request.names)
        assert b"Sec-WebSocket-Key: " in request.raw

    async def test_nominated_fields_stay_behind(self, proxy, upstream):
        running = await proxy(upstream.url)
        ask = [("Connection", "keep-alive, Upgrade, X-Secret"), *ASK[1:], ("X-Secret", "1"), ("Keep-Alive", "x")]
        await running.ask("GET", "/ws", ask)
        _, request = await upstream.request()
        assert request.all("Connection") == ["Upgrade"]
        assert not {"x-secret", "keep-alive"} & set(request.names)

    async def test_the_upstreams_choice_comes_back(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", [*ASK, ("Sec-WebSocket-Protocol", "a, b")])
        conn, _ = await upstream.request()
        chosen = [("Sec-WebSocket-Protocol", "b"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("X-Hop", "1")]
        grant = [("Connection", "Upgrade, X-Hop"), *GRANT[1:]]
        await conn.send_head(101, [*grant, *chosen, ("Keep-Alive", "timeout=5")], reason="Go On")
        head = await downstream.read_head()
        assert (head.status, head.reason) == (101, "Go On")
        assert (head.header("Connection"), head.header("Upgrade")) == ("Upgrade", "websocket")
        assert head.header("Sec-WebSocket-Accept") == accept_value(KEY)
        assert head.header("Sec-WebSocket-Protocol") == "b"
        assert head.all("Set-Cookie") == ["a=1", "b=2"]
        assert not {"x-hop", "keep-alive", "content-length", "transfer-encoding", "server"} & set(head.names)

    async def test_interim_responses_before_the_101_are_skipped(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        await conn.send_head(101, GRANT)
        assert (await downstream.read_head()).status == 101

    async def test_an_endless_row_of_them_is_a_502(self, proxy, upstream, expect_log):
        expect_log("too many interim responses")
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        assert (await downstream.read_response()).status == 502

    async def test_nothing_but_the_handshake_is_sent_before_the_101(self, proxy, upstream):
        """UP-11: frames that the client sends early wait, and go upstream after the 101."""
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, request = await upstream.request()
        await downstream.send(b"early frames")
        # Time enough for a byte that should not come.
        await asyncio.sleep(0.2)
        assert not conn.is_closed_by_other()
        assert conn._buffer == b""
        assert b"early" not in request.raw
        await conn.send_head(101, GRANT)
        assert await conn.read_exactly(12) == b"early frames"

    async def test_early_frames_in_the_same_segment_go_after_the_101_too(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        downstream.expect("GET")
        await downstream.send(ASKING + b"early")
        conn, _ = await upstream.request()
        assert not conn.is_closed_by_other()
        assert conn._buffer == b""
        await conn.send_head(101, GRANT)
        assert await conn.read_exactly(5) == b"early"

    async def test_early_frames_are_bounded(self, proxy, upstream):
        """UP-11: what a client sends before the 101 stays in the kernel, not in the proxy."""
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        sender = Sender(downstream.sock, "raw")
        await until(sender.stalled, "the client was held back")
        assert sender.sent < HELD + KERNEL
        await conn.send_head(101, GRANT)
        total = sender.sent + 4 * MIB
        received = 0
        while received < total:
            received += len(await conn.read_some(MIB))
        await sender.stop()

    async def test_bytes_right_behind_the_101_arrive(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.send(GRANTING + b"\x81\x05hello")
        assert (await downstream.read_head()).status == 101
        assert await downstream.read_exactly(7) == b"\x81\x05hello"


class TestWhatIsNoHandshake:
    @pytest.mark.parametrize(
        ("method", "headers", "body"),
        [
            ("GET", [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "x")], None),
            ("GET", [("Connection", "Upgrade"), ("Upgrade", "something")], None),
            ("GET", [("Upgrade", "websocket")], None),
            ("POST", ASK, b""),
            ("GET", ASK, b"body"),
            ("GET", [*ASK, ("Transfer-Encoding", "chunked")], b"4\r\nbody\r\n0\r\n\r\n"),
        ],
        ids=["h2c", "unknown", "not nominated", "POST", "length", "chunked"],
    )
    async def test_goes_on_as_plain_http(self, proxy, echo, method, headers, body):
        running = await proxy(echo.url)
        assert (await running.request(method, "/x", headers, body)).status == 200
        assert not {"upgrade", "connection", "http2-settings"} & set(echo.requests[-1].names)

    async def test_nor_does_http_1_0_upgrade(self, proxy, echo):
        running = await proxy(echo.url)
        downstream = await running.connect()
        downstream.expect("GET")
        await downstream.send(ASKING.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (await downstream.read_response()).status == 200
        assert not echo.requests[-1].has("Upgrade")

    async def test_an_unasked_101_is_a_502(self, proxy, upstream, expect_log):
        expect_log("answered with status 101")
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(101, GRANT)
        assert (await downstream.read_response()).status == 502


class TestARefusalByTheUpstream:
    @pytest.mark.parametrize("mode", ["stream", "buffer"])
    @pytest.mark.parametrize("framing", ["length", "chunked", "close"])
    @pytest.mark.parametrize("status", [200, 401, 403, 404, 426, 500])
    async def test_passes_with_head_and_body(self, proxy, upstream, mode, framing, status):
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        end = {"length": [("Content-Length", "3")], "chunked": [("Transfer-Encoding", "chunked")], "close": []}
        await conn.send_head(status, [("WWW-Authenticate", "Bearer"), *end[framing]])
        await conn.send(b"3\r\nwho\r\n0\r\n\r\n" if framing == "chunked" else b"who")
        if framing == "close":
            conn.close()
        response = await downstream.read_response()
        assert (response.status, response.body, response.complete) == (status, b"who", True)
        assert response.header("WWW-Authenticate") == "Bearer"
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.error, outcome.bytes_down) == (status, None, 3)

    async def test_leaves_the_downstreams_connection_for_the_next_request(self, proxy, upstream):
        """No tunnel is open: what comes next is a request, with our own fields."""
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.respond(403, body=b"no")
        assert (await downstream.read_response()).status == 403
        assert await conn.closed() == "end"
        await downstream.request("GET", "/next", [("Host", "internal")])
        conn, request = await upstream.request()
        assert (request.target, request.header("Host")) == ("/next", f"127.0.0.1:{upstream.port}")
        await conn.respond(200)
        assert (await downstream.read_response()).status == 200

    async def test_is_streamed(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.send_head(403, [("Transfer-Encoding", "chunked")])
        await conn.send_chunk(b"one")
        await downstream.read_head()
        assert await downstream.read_body(3) == b"one"
        await conn.send_chunk(b"")
        assert await downstream.read_body() == b""

    async def test_that_breaks_off_arrives_broken(self, proxy, upstream, expect_log):
        expect_log("in the middle of its body")
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.send_head(403, [("Content-Length", "10")])
        await conn.send(b"half")
        conn.close()
        response = await downstream.read_response()
        assert (response.status, response.body, response.complete) == (403, b"half", False)

    async def test_is_ended_when_the_downstream_leaves(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.send_head(403, [("Transfer-Encoding", "chunked")])
        await downstream.read_head()
        downstream.close()
        await conn.closed()
        assert (await running.next_outcome()).side == "downstream"

    async def test_has_its_redirect_and_cookies_brought_under_the_mount(self, proxy, upstream):
        running = await proxy(upstream.url + "/base", prefix="/app")
        downstream = await running.ask("GET", "/app/ws", ASK)
        conn, _ = await upstream.request()
        await conn.respond(302, [("Location", "/base/login"), ("Set-Cookie", "s=1; Path=/base")])
        response = await downstream.read_response()
        assert response.header("Location") == "/app/login"
        assert response.header("Set-Cookie") == "s=1; Path=/app"

    async def test_goes_through_status_callbacks_and_rewrite_response(self, proxy, upstream):
        def rewrite(handler, response):
            response.headers["X-Rewritten"] = "1"

        def sorry(handler, response):
            handler.set_status(404)
            handler.finish("sorry")

        running = await proxy(upstream.url, status_callbacks={404: sorry}, rewrite_response=rewrite)
        for status, header, body in ((401, "1", b"who"), (404, None, b"sorry")):
            downstream = await running.ask("GET", "/ws", ASK)
            conn, _ = await upstream.request()
            await conn.respond(status, body=b"who")
            response = await downstream.read_response()
            assert (response.status, response.header("X-Rewritten"), response.body) == (status, header, body)


class TestABadAnswer:
    @pytest.mark.parametrize(
        ("grant", "said"),
        [
            (GRANT[1:], "Connection"),
            ([GRANT[0], GRANT[2]], "another protocol"),
            ([GRANT[0], ("Upgrade", "h2c"), GRANT[2]], "another protocol"),
            (GRANT[:2], "Accept"),
            ([*GRANT[:2], ("Sec-WebSocket-Accept", "wrong")], "Accept"),
            ([*GRANT, ("A B", "1")], "invalid field"),
            ([*GRANT, ("A", "x" * 70_000)], "too long a head"),
        ],
        ids=["Connection", "Upgrade", "h2c", "no accept", "wrong accept", "field", "huge"],
    )
    async def test_is_a_502_and_opens_no_tunnel(self, proxy, upstream, expect_log, grant, said):
        expect_log(said)
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        with contextlib.suppress(ConnectionError):
            await conn.send_head(101, grant)
        assert (await downstream.read_response()).status == 502
        await conn.closed()
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side, outcome.phase, outcome.attempts) == (502, "upstream", "upgrade", 1)

    @pytest.mark.parametrize("end", ["close", "reset"])
    async def test_half_a_101_is_a_502_and_the_proxy_lives(self, proxy, upstream, expect_log, end):
        """UP-08: the upstream accepts, sends half of a 101 and resets."""
        expect_log("before its answer was complete")
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 101 Switching Proto")
        getattr(conn, end)()
        assert (await downstream.read_response()).status == 502
        assert (await running.next_outcome()).attempts == 1
        await opened(running, upstream)

    async def test_silence_is_a_504_after_response_timeout(self, proxy, upstream, expect_log):
        expect_log("no answer within")
        running = await proxy(upstream.url, response_timeout=0.1)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        assert (await downstream.read_response()).status == 504
        await conn.closed()

    async def test_no_connection_is_a_502_and_tried_again(self, proxy, upstream, expect_log):
        expect_log("Connect call failed")
        errors = []
        upstream.refuse()
        running = await proxy(upstream.url, error_callback=errors.append)
        assert (await running.request("GET", "/ws", ASK)).status == 502
        outcome = await running.next_outcome()
        assert (outcome.phase, outcome.attempts) == ("connect", 2)
        assert errors == [outcome.error]

    async def test_a_connection_that_takes_too_long_is_a_504(self, proxy, expect_log):
        expect_log("no connection in time")
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as waiting:
            # The kernel completes what the backlog holds; the next one waits.
            for _ in range(4):
                sock = waiting.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(full.getsockname())
            running = await proxy(f"http://127.0.0.1:{full.getsockname()[1]}", connect_timeout=0.2)
            assert (await running.request("GET", "/ws", ASK)).status == 504

    async def test_a_downstream_that_leaves_meanwhile_ends_it(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        downstream.close()
        await conn.closed()
        assert (await running.next_outcome()).status == 499


class TestWhoMayOpenATunnel:
    async def test_a_prepare_that_denies_means_no_upstream_connection(self, proxy, upstream):
        """UP-06."""

        class Denied(ProxyHandler):
            async def prepare(self):
                raise HTTPError(401)

        running = await proxy(upstream.url, Denied)
        assert (await running.request("GET", "/ws", ASK)).status == 401
        assert upstream.accepted == 0

    async def test_a_foreign_origin_gets_403_where_there_is_a_list(self, proxy, upstream):
        """UP-07."""
        running = await proxy(upstream.url, allowed_origins=["https://app.example", "http://127.0.0.1:8000"])
        for origin in (
            "http://evil",
            "https://app.example.evil",
            "http://app.example",
            "https://app.example:8443",
            "null",
            "",
        ):
            assert (await running.request("GET", "/ws", [*ASK, ("Origin", origin)])).status == 403
        two = [("Origin", "https://app.example"), ("Origin", "http://evil")]
        assert (await running.request("GET", "/ws", [*ASK, *two])).status == 403
        assert upstream.accepted == 0
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side, outcome.phase) == (403, "downstream", "upgrade")

    @pytest.mark.parametrize("origin", ["https://app.example", "HTTPS://APP.example:443", None])
    async def test_an_origin_of_the_list_and_a_client_without_one_pass(self, proxy, upstream, origin):
        """UP-07: what sends no Origin is no browser."""
        running = await proxy(upstream.url, allowed_origins=["https://app.example"])
        await opened(running, upstream, headers=[("Origin", origin)] if origin else [])

    async def test_the_list_is_about_tunnels_only(self, proxy, echo):
        running = await proxy(echo.url, allowed_origins=["https://app.example"])
        assert (await running.get("/x", [("Origin", "http://evil")])).status == 200

    async def test_websocket_false_answers_403(self, proxy, upstream):
        running = await proxy(upstream.url, websocket=False)
        assert (await running.request("GET", "/ws", ASK)).status == 403
        assert upstream.accepted == 0

    @pytest.mark.parametrize(
        "target",
        ["/app/../secret", "/app/%2e%2e/secret", "/app/..%2fsecret", "/app//../../secret", "/app/;/../../secret"],
    )
    async def test_no_target_leaves_the_base_path(self, proxy, upstream, target):
        """UP-12."""
        running = await proxy(upstream.url + "/base", prefix="/app")
        assert (await running.request("GET", target, ASK)).status == 400
        assert upstream.accepted == 0

    async def test_a_longer_name_is_not_below_the_mount(self, proxy, upstream):
        """UP-12."""
        running = await proxy(upstream.url + "/base", prefix="/app")
        assert (await running.request("GET", "/app;/../secret", ASK)).status == 404
        assert upstream.accepted == 0


class TestHooks:
    async def test_see_the_handshake_the_101_and_the_end(self, proxy, upstream):
        seen = []

        def rewrite_request(handler, request):
            seen.append(("request", request.upgrade))
            request.headers["X-User"] = "alice"

        def rewrite_response(handler, response):
            seen.append(("response", response.status, response.body))
            response.headers["X-Seen"] = "1"

        def observe(handler, response):
            seen.append(("status", response.status))

        async def choose():
            seen.append("choose")
            return upstream.url

        running = await proxy(
            choose, rewrite_request=rewrite_request, rewrite_response=rewrite_response, status_callbacks={"*": observe}
        )
        downstream = await running.ask("GET", "/ws", ASK)
        conn, request = await upstream.request()
        assert request.header("X-User") == "alice"
        await conn.send_head(101, GRANT)
        assert (await downstream.read_head()).header("X-Seen") == "1"
        assert seen == ["choose", ("request", True), ("status", 101), ("response", 101, None)]
        assert running.outcomes == []
        await downstream.send(b"12345")
        assert await conn.read_exactly(5) == b"12345"
        await conn.send(b"abc")
        assert await downstream.read_exactly(3) == b"abc"
        conn.close()
        await downstream.closed()
        downstream.close()
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side, outcome.phase, outcome.error) == (101, None, None, None)
        assert (outcome.bytes_up, outcome.bytes_down, outcome.upstream) == (5, 3, upstream.url)
        assert running.access_log == [(101, "GET", "/ws")]
        assert running.outcomes == [outcome]

    async def test_may_have_a_plain_request_sent_instead(self, proxy, echo):
        def plain(handler, request):
            request.upgrade = False

        running = await proxy(echo.url, rewrite_request=plain)
        assert (await running.request("GET", "/ws", ASK)).status == 200
        assert not echo.requests[-1].has("Upgrade")

    @pytest.mark.parametrize("change", ["method", "body"])
    async def test_that_make_it_another_request_have_that_sent(self, proxy, echo, change):
        def rewrite(handler, request):
            setattr(request, change, {"method": "POST", "body": b"x"}[change])

        running = await proxy(echo.url, rewrite_request=rewrite)
        assert (await running.request("GET", "/ws", ASK)).status == 200
        assert not echo.requests[-1].has("Upgrade")

    async def test_cannot_ask_for_a_tunnel_that_the_downstream_did_not(self, proxy, echo):
        def rewrite(handler, request):
            request.upgrade = True

        running = await proxy(echo.url, rewrite_request=rewrite)
        assert (await running.get("/x")).status == 200
        assert not echo.requests[-1].has("Upgrade")

    @pytest.mark.parametrize("how", ["answer", "raise", "status", "inject"])
    async def test_that_answer_or_fail_on_the_101_close_the_upstream(self, proxy, upstream, expect_log, how):
        def rewrite(handler, response):
            if how == "answer":
                handler.set_status(418)
                handler.finish()
            elif how == "raise":
                raise HTTPError(418)
            elif how == "status":
                response.status = 418
            else:
                response.headers["X-A"] = "1\r\nX-B: 2"

        expect_log("Invalid header value|control character", required=how == "inject")
        running = await proxy(upstream.url, rewrite_response=rewrite)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.send_head(101, GRANT)
        assert (await downstream.read_head()).status == (500 if how == "inject" else 418)
        await conn.closed()

    async def test_handle_error_may_answer_for_a_handshake_that_failed(self, proxy, upstream, expect_log):
        expect_log("Connect call failed")

        def sorry(error, handler):
            handler.set_status(503)
            handler.finish("sorry")

        upstream.refuse()
        running = await proxy(upstream.url, error_callback=sorry)
        response = await running.request("GET", "/ws", ASK)
        assert (response.status, response.body) == (503, b"sorry")

    async def test_fields_set_on_the_handler_are_sent_with_the_101(self, proxy, upstream):
        class Tagged(ProxyHandler):
            async def prepare(self):
                self.set_header("X-Tag", "1")
                await super().prepare()

        running = await proxy(upstream.url, Tagged)
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.send_head(101, GRANT)
        head = await downstream.read_head()
        assert head.header("X-Tag") == "1"
        assert not head.has("Content-Type")
