"""A websocket handshake goes upstream first; a valid 101 makes a tunnel, and all else is a response like any other.

The scenarios of the reliability plan are named by their ids, ``UP-02`` to ``UP-12``; UP-01 is in
``tests/real/test_websockets.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import socket
import ssl
import subprocess
from pathlib import Path
from time import monotonic

import pytest
from tornado.web import HTTPError

from tests.proxy.test_backpressure import HELD, KERNEL, MIB, PIECE, Sender
from tests.proxy.test_cancel import until
from tests.support.downstream import Downstream
from tests.support.process import StandaloneProxy
from tests.support.upstream import ScriptedUpstream
from tornado_proxy import ProxyHandler, forwarder, tunnel
from tornado_proxy.handshake import accept_value

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ASK = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", KEY),
]
GRANT = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Accept", accept_value(KEY))]
# Seconds until the other side must have seen the end.
AT_ONCE = 1.0
DIRECTIONS = pytest.mark.parametrize("direction", ["up", "down"])


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Most tests leave one end open, which nobody has to wait for."""
    monkeypatch.setattr(tunnel, "HALF_CLOSED", 0.3)


@pytest.fixture
def patient(soon, monkeypatch):
    monkeypatch.setattr(tunnel, "HALF_CLOSED", 30.0)


async def opened(running, upstream, target="/ws", headers=()):
    """Return both ends of a new tunnel."""
    downstream = await running.ask("GET", target, [*ASK, *headers])
    conn, _ = await upstream.request()
    await conn.send_head(101, GRANT)
    assert (await downstream.read_head()).status == 101
    return downstream, conn


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
        head = "GET /ws HTTP/1.1\r\nHost: h\r\n" + "".join(f"{name}: {value}\r\n" for name, value in ASK) + "\r\n"
        downstream.expect("GET")
        await downstream.send(head.encode() + b"early")
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
        head = "HTTP/1.1 101 X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in GRANT) + "\r\n"
        await conn.send(head.encode() + b"\x81\x05hello")
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
        fields = "".join(f"{name}: {value}\r\n" for name, value in ASK)
        downstream.expect("GET")
        await downstream.send(f"GET /x HTTP/1.0\r\nHost: h\r\n{fields}\r\n".encode())
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


class TestTheEnd:
    async def test_what_the_upstream_sent_last_arrives_and_then_its_end(self, proxy, upstream, patient):
        """UP-03: a close frame and FIN."""
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        await conn.send(b"\x88\x02\x03\xe8")
        conn.close()
        assert await downstream.read_exactly(4) == b"\x88\x02\x03\xe8"
        assert await downstream.closed() == "end"
        downstream.close()

    @pytest.mark.parametrize("stalled", [False, True], ids=["idle", "stalled"])
    async def test_a_reset_downstream_reaches_the_upstream_at_once(self, proxy, upstream, stalled):
        """UP-04, also while the upstream takes nothing and so nobody reads from the downstream."""
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        if stalled:
            sender = Sender(downstream.sock, "raw")
            await until(sender.stalled, "the client was held back")
            await sender.stop()
        started = monotonic()
        downstream.reset()
        outcome = await running.next_outcome()
        await conn.closed()
        assert monotonic() - started < AT_ONCE
        assert (outcome.status, outcome.side, outcome.phase) == (101, "downstream", "upgrade")

    @pytest.mark.parametrize("end", ["close", "half_close"])
    async def test_a_downstream_that_leaves_is_passed_on_at_once(self, proxy, upstream, end):
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        started = monotonic()
        getattr(downstream, end)()
        assert await conn.closed() == "end"
        assert monotonic() - started < AT_ONCE

    async def test_a_reset_upstream_is_passed_on_at_once(self, proxy, upstream, expect_log):
        expect_log("reset the tunnel")
        errors = []
        running = await proxy(upstream.url, error_callback=errors.append)
        downstream, conn = await opened(running, upstream)
        await conn.send(b"last")
        assert await downstream.read_exactly(4) == b"last"
        started = monotonic()
        conn.reset()
        await downstream.closed()
        assert monotonic() - started < AT_ONCE
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side, outcome.phase) == (101, "upstream", "upgrade")
        assert errors == [outcome.error]

    async def test_a_half_closed_downstream_still_gets_what_the_upstream_sends(self, proxy, upstream, patient):
        """UP-05."""
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        downstream.half_close()
        assert await conn.closed() == "end"
        for piece in (b"one", b"two"):
            await conn.send(piece)
            assert await downstream.read_exactly(3) == piece
        conn.close()
        assert await downstream.closed() == "end"
        assert (await running.next_outcome()).error is None

    async def test_a_half_closed_upstream_still_gets_what_the_downstream_sends(self, proxy, upstream, patient):
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        conn.half_close()
        assert await downstream.closed() == "end"
        await downstream.send(b"more")
        assert await conn.read_exactly(4) == b"more"
        downstream.close()
        assert await conn.closed() == "end"

    async def test_the_other_half_is_open_for_a_bounded_time(self, proxy, upstream, monkeypatch):
        """UP-05."""
        monkeypatch.setattr(tunnel, "HALF_CLOSED", 0.1)
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        downstream.half_close()
        assert await downstream.closed() == "end"
        await conn.closed()

    async def test_silence_beyond_tunnel_idle_timeout_ends_it(self, proxy, upstream):
        running = await proxy(upstream.url, tunnel_idle_timeout=0.3)
        downstream, conn = await opened(running, upstream)
        started = monotonic()
        for _ in range(4):
            await asyncio.sleep(0.1)
            await downstream.send(b"x")
            await conn.read_exactly(1)
        assert await conn.closed() == "end"
        assert await downstream.closed() == "end"
        assert 0.6 < monotonic() - started < 1.5
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side, outcome.phase) == (101, "proxy", "upgrade")

    async def test_the_time_limits_of_responses_do_not_end_it(self, proxy, upstream):
        running = await proxy(upstream.url, idle_timeout=0.1, response_timeout=0.1, write_timeout=0.1)
        downstream, conn = await opened(running, upstream)
        await asyncio.sleep(0.4)
        await conn.send(b"late")
        assert await downstream.read_exactly(4) == b"late"

    async def test_total_timeout_does(self, proxy, upstream, expect_log):
        expect_log("exchange took more than")
        running = await proxy(upstream.url, total_timeout=0.3)
        downstream, conn = await opened(running, upstream)
        await downstream.closed()
        await conn.closed()


class TestBackPressure:
    """Against the standalone program, so that its memory can be told from the test's own."""

    @pytest.fixture
    async def served(self):
        async with ScriptedUpstream() as upstream:
            starting = StandaloneProxy("--to", upstream.url)
            proxy = await asyncio.to_thread(starting.__enter__)
            try:
                yield upstream, proxy
            finally:
                await asyncio.to_thread(proxy.signal, 9)
                await asyncio.to_thread(proxy.stop)

    @DIRECTIONS
    async def test_a_side_that_does_not_read_makes_the_other_wait(self, served, direction):
        """UP-02: 64 MB each way with one side that stalls; memory stays and every byte arrives."""
        upstream, proxy = served
        async with await Downstream.connect(proxy.port) as downstream:
            await downstream.request("GET", "/ws", ASK)
            conn, _ = await upstream.request()
            await conn.send_head(101, GRANT)
            await downstream.read_head()
            source, sink = (downstream, conn) if direction == "up" else (conn, downstream)
            before = proxy.rss()
            sender = Sender(source.sock, "raw")
            await until(sender.stalled, "the sender was held back")
            assert sender.sent < HELD + KERNEL
            assert proxy.rss() - before < 2 * MIB
            # The other direction is free meanwhile.
            await sink.send(b"still here")
            assert await source.read_exactly(10) == b"still here"
            received = 0
            while received < 64 * MIB:
                data = await sink.read_exactly(len(PIECE))
                assert data == PIECE
                received += len(data)
            await sender.stop()
            assert proxy.rss() - before < 8 * MIB


class TestManyIdleTunnels:
    COUNT = 2000
    # Bytes of the proxy's memory for each.
    EACH = 60_000

    @pytest.mark.slow
    async def test_cost_little_and_answer_afterwards(self, monkeypatch):
        """UP-09, with fewer tunnels and no ten minutes."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 2 * self.COUNT + 500
        if hard != resource.RLIM_INFINITY and hard < needed:
            pytest.skip(f"needs {needed} descriptors, the limit is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
        async with ScriptedUpstream() as upstream, contextlib.AsyncExitStack() as stack:
            starting = StandaloneProxy("--to", upstream.url)
            proxy = await asyncio.to_thread(starting.__enter__)
            stack.callback(proxy.stop)
            stack.callback(proxy.signal, 9)

            async def one() -> tuple[Downstream, object]:
                downstream = await stack.enter_async_context(await Downstream.connect(proxy.port))
                await downstream.request("GET", "/ws", ASK)
                conn, _ = await upstream.request()
                await conn.send_head(101, GRANT)
                return downstream, conn

            warm = [await one() for _ in range(50)]
            for downstream, _ in warm:
                await downstream.read_head()
            before, cpu = proxy.rss(), proxy.cpu()
            tunnels = [await one() for _ in range(self.COUNT)]
            for downstream, _ in tunnels:
                assert (await downstream.read_head()).status == 101
            each = (proxy.rss() - before) / self.COUNT
            opening = proxy.cpu() - cpu
            cpu = proxy.cpu()
            await asyncio.sleep(1)
            idle = proxy.cpu() - cpu
            print(f"{each / 1000:.1f} kB a tunnel, {1000 * opening / self.COUNT:.2f} ms to open one, idle {idle:.1%}")
            assert each < self.EACH
            assert idle < 0.05
            # Frames have no names here: which end of which does not matter, as long as each answers.
            for downstream, _ in tunnels:
                await downstream.send(b"ping")
            for _, conn in tunnels:
                await conn.read_exactly(4)
                await conn.send(b"pong")
            for downstream, _ in tunnels:
                assert await downstream.read_exactly(4) == b"pong"


class TestDrain:
    async def test_refuses_new_tunnels_with_503(self, proxy, upstream, monkeypatch):
        """UP-10: on a connection that was there before."""
        running = await proxy(upstream.url)
        old, old_conn = await opened(running, upstream)
        monkeypatch.setattr(forwarder, "_draining", True)
        response = await running.request("GET", "/ws", ASK)
        assert (response.status, response.header("Retry-After")) == (503, "1")
        assert upstream.accepted == 1
        await old.send(b"x")
        assert await old_conn.read_exactly(1) == b"x"

    async def test_waits_for_tunnels_until_its_timeout_then_closes_them(self, upstream):
        """UP-10: 100 tunnels and SIGTERM; each has its line in the access log."""
        starting = StandaloneProxy("--to", upstream.url, "--drain-timeout", "1", "--access-log", "json")
        proxy = await asyncio.to_thread(starting.__enter__)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, proxy.stop)
            tunnels = []
            for _ in range(100):
                downstream = await stack.enter_async_context(await Downstream.connect(proxy.port))
                await downstream.request("GET", "/ws?secret", ASK)
                conn, _ = await upstream.request()
                await conn.send_head(101, GRANT)
                await downstream.read_head()
                tunnels.append((downstream, conn))
            proxy.signal(signal.SIGTERM)
            await asyncio.to_thread(proxy.wait_for_line, "waiting for 100 exchanges")
            with pytest.raises(OSError, match=r"."):  # noqa: PT012
                while True:
                    (await Downstream.connect(proxy.port)).close()
            for downstream, conn in tunnels:
                await downstream.send(b"alive")
                assert await conn.read_exactly(5) == b"alive"
            for downstream, conn in tunnels:
                assert await downstream.closed() == "end"
                assert await conn.closed() == "end"
            assert await asyncio.to_thread(proxy.wait) == 0
            await asyncio.to_thread(proxy.stop)
            lines = [json.loads(line) for line in proxy.output.splitlines() if line.startswith("{")]
            assert len(lines) == 100
            assert {(line["status"], line["phase"], line["bytes_up"], line["path"]) for line in lines} == {
                (101, "upgrade", 5, "/ws")
            }

    async def test_ends_as_soon_as_the_last_tunnel_does(self, upstream):
        starting = StandaloneProxy("--to", upstream.url)
        proxy = await asyncio.to_thread(starting.__enter__)
        try:
            async with await Downstream.connect(proxy.port) as downstream:
                await downstream.request("GET", "/ws", ASK)
                conn, _ = await upstream.request()
                await conn.send_head(101, GRANT)
                await downstream.read_head()
                proxy.signal(signal.SIGTERM)
                await asyncio.to_thread(proxy.wait_for_line, "waiting for 1 exchanges")
            await conn.closed()
            conn.close()
            assert await asyncio.to_thread(proxy.wait) == 0
        finally:
            await asyncio.to_thread(proxy.stop)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def server_tls(certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


class TLSUpstream:
    """Grants every handshake over TLS and echoes. ``names`` are the server names asked for."""

    def __init__(self, certificate) -> None:
        self.context = server_tls(certificate)
        self.names: list[str | None] = []
        self.context.sni_callback = lambda sock, name, context: self.names.append(name)
        self.ended = asyncio.Event()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "localhost", 0, ssl=self.context, family=socket.AF_INET)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        try:
            await reader.readuntil(b"\r\n\r\n")
            fields = "".join(f"{name}: {value}\r\n" for name, value in GRANT)
            writer.write(f"HTTP/1.1 101 X\r\n{fields}\r\n".encode())
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.ended.set()
            writer.close()


class TestTLS:
    async def test_in_front(self, proxy, upstream, certificate):
        """Tornado's own TLS stream: both directions pass and its end ends the tunnel."""
        running = await proxy(upstream.url, server_options={"ssl_options": server_tls(certificate)})
        context = ssl.create_default_context(cafile=certificate[0])
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", running.port, ssl=context, server_hostname="localhost"
        )
        fields = "".join(f"{name}: {value}\r\n" for name, value in ASK)
        writer.write(f"GET /ws HTTP/1.1\r\nHost: h\r\n{fields}\r\nearly".encode())
        conn, request = await upstream.request()
        assert request.header("X-Forwarded-Proto") == "https"
        await conn.send_head(101, GRANT)
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        assert await conn.read_exactly(5) == b"early"
        big = bytes(range(256)) * 8192
        sending = asyncio.ensure_future(conn.send(big))
        assert await reader.readexactly(len(big)) == big
        await sending
        writer.write(big)
        assert await conn.read_exactly(len(big)) == big
        started = monotonic()
        writer.close()
        await conn.closed()
        assert monotonic() - started < AT_ONCE
        outcome = await running.next_outcome()
        assert (outcome.error, outcome.bytes_up, outcome.bytes_down) == (None, len(big) + 5, len(big))

    async def test_in_front_the_upstreams_last_bytes_come_before_the_end(self, proxy, upstream, certificate):
        """UP-03 under TLS."""
        running = await proxy(upstream.url, server_options={"ssl_options": server_tls(certificate)})
        context = ssl.create_default_context(cafile=certificate[0])
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", running.port, ssl=context, server_hostname="localhost"
        )
        fields = "".join(f"{name}: {value}\r\n" for name, value in ASK)
        writer.write(f"GET /ws HTTP/1.1\r\nHost: h\r\n{fields}\r\n".encode())
        conn, _ = await upstream.request()
        await conn.send_head(101, GRANT)
        await reader.readuntil(b"\r\n\r\n")
        await conn.send(b"last")
        conn.close()
        assert await asyncio.wait_for(reader.read(), 5) == b"last"
        writer.close()

    @pytest.mark.parametrize("scheme", ["https", "wss"])
    async def test_upstream(self, proxy, certificate, scheme):
        async with TLSUpstream(certificate) as upstream:
            options = {"ca_certs": str(certificate[0])}
            running = await proxy(
                f"{scheme}://localhost:{upstream.port}", client_options=options, preserve_host_header=True
            )
            downstream = await running.ask("GET", "/ws", [("Host", "other.example"), *ASK])
            assert (await downstream.read_head()).status == 101
            big = bytes(range(256)) * 8192
            sending = asyncio.ensure_future(downstream.send(big))
            assert await downstream.read_exactly(len(big)) == big
            await sending
            assert upstream.names == ["localhost"]
            started = monotonic()
            downstream.close()
            await asyncio.wait_for(upstream.ended.wait(), 5)
            assert monotonic() - started < AT_ONCE
            assert (await running.next_outcome()).error is None

    async def test_upstream_is_verified(self, proxy, certificate, expect_log):
        expect_log("certificate verify failed")
        async with TLSUpstream(certificate) as upstream:
            running = await proxy(f"https://localhost:{upstream.port}", retries=0)
            assert (await running.request("GET", "/ws", ASK)).status == 502
            outcome = await running.next_outcome()
            assert (outcome.side, outcome.phase) == ("upstream", "tls")

    async def test_upstream_must_have_the_name_in_the_url(self, proxy, certificate, expect_log):
        expect_log("not valid for '127.0.0.1'|IP address mismatch")
        async with TLSUpstream(certificate) as upstream:
            options = {"ca_certs": str(certificate[0])}
            running = await proxy(f"https://127.0.0.1:{upstream.port}", client_options=options, retries=0)
            assert (await running.request("GET", "/ws", ASK)).status == 502

    async def test_upstream_without_verification_where_that_is_asked_for(self, proxy, certificate):
        async with TLSUpstream(certificate) as upstream:
            running = await proxy(f"https://127.0.0.1:{upstream.port}", client_options={"validate_cert": False})
            downstream = await running.ask("GET", "/ws", ASK)
            assert (await downstream.read_head()).status == 101


class TestOtherUpstreams:
    async def test_ws_is_http(self, proxy, upstream):
        running = await proxy(f"ws://127.0.0.1:{upstream.port}")
        await opened(running, upstream)

    async def test_a_unix_socket(self, proxy, upstreams, tmp_path):
        async with ScriptedUpstream(unix_socket=tmp_path / "up.sock") as upstream:
            upstreams.append(upstream)
            running = await proxy("http://app", client_options={"unix_socket": str(tmp_path / "up.sock")})
            downstream, conn = await opened(running, upstream)
            await downstream.send(b"x")
            assert await conn.read_exactly(1) == b"x"
            downstream.half_close()
            assert await conn.closed() == "end"
            await conn.send(b"y")
            assert await downstream.read_exactly(1) == b"y"
            # The fixture checks the upstream when the proxy has stopped, and by then this one is gone.
            conn.close()
            assert await downstream.closed() == "end"
            upstreams.remove(upstream)

    async def test_a_unix_socket_in_front(self, upstream, tmp_path):
        path = tmp_path / "front.sock"
        starting = StandaloneProxy("--to", upstream.url, "--listen", f"unix:{path}")
        proxy = await asyncio.to_thread(starting.__enter__)
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
            fields = "".join(f"{name}: {value}\r\n" for name, value in ASK)
            writer.write(f"GET /ws HTTP/1.1\r\nHost: h\r\n{fields}\r\n".encode())
            conn, _ = await upstream.request()
            await conn.send_head(101, GRANT)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"x")
            assert await conn.read_exactly(1) == b"x"
            writer.close()
            await conn.closed()
            conn.close()
        finally:
            await asyncio.to_thread(proxy.stop)
