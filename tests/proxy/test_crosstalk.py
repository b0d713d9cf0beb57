"""No exchange ever gets a byte of another's, whatever happens to the others."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections import Counter
from time import monotonic

from tests.support.downstream import Downstream
from tests.support.wire import LAST_CHUNK, WireClosed, WireTimeout, chunk
from tornado_proxy import draining

CHUNKED = [("Transfer-Encoding", "chunked")]
CONNECTIONS = 64
# Requests of the mixed run: TORNADO_PROXY_CROSSTALK=100000 for the whole of LD-06.
REQUESTS = int(os.environ.get("TORNADO_PROXY_CROSSTALK", "5000"))


def filler(token: str, size: int) -> bytes:
    """Return `size` bytes that only this token's body has."""
    seed = hashlib.sha256(token.encode()).hexdigest().encode()
    return (seed * (size // len(seed) + 1))[:size]


class TestTokens:
    """LD-06: each request has a token in its head and body, and so has its answer; others abort and are reset."""

    async def test_never_cross(self, proxy, upstream, expect_log):
        expect_log("upstream|POST|GET", required=False)
        chance = random.Random(6)
        seen: Counter[str] = Counter()
        results: Counter[str] = Counter()

        async def serve(conn, request):
            token = request.header("X-Token")
            seen[token] += 1
            kind = request.target.split("/")[1]
            size = int(request.target.split("/")[2])
            assert request.target.endswith(f"/{token}")
            assert not request.body or request.body == filler(token, len(request.body)), "an upload was mixed up"
            head = [("X-Token", token)]
            if kind == "cut":
                await conn.send_head(200, [*head, ("Content-Length", str(size + 1))])
                await conn.send(filler(token, size))
                (conn.reset if chance.random() < 0.5 else conn.close)()
            elif kind == "die":
                (conn.reset if chance.random() < 0.5 else conn.close)()
            elif kind == "chunked":
                await conn.send_head(200, [*head, *CHUNKED])
                body = filler(token, size)
                for start in range(0, size, 7001):
                    await conn.send_chunk(body[start : start + 7001])
                    if chance.random() < 0.1:
                        await asyncio.sleep(0)
                await conn.send(LAST_CHUNK)
            elif kind == "404":
                await conn.respond(404, head, filler(token, size))
            else:
                await conn.respond(200, head, filler(token, size))

        upstream.serve(serve)
        running = await proxy(upstream.url, client_options={"max_clients": 100})

        async def ask(downstream: Downstream, token: str) -> bool:
            """Do one exchange; return whether the connection can be used again."""
            kind = chance.choices(("plain", "chunked", "404", "cut", "die"), (60, 25, 5, 5, 5))[0]
            size = chance.choice((0, 1, 100, 5_000, 5_000, 40_000))
            method = chance.choice(("GET", "GET", "POST", "PUT", "HEAD"))
            if method == "HEAD":
                kind = "plain"
            target = f"/{kind}/{size}/{token}"
            body, headers = None, [("X-Token", token)]
            if method in ("POST", "PUT"):
                body = filler(token, chance.choice((0, 10, 3_000, 30_000)))
                if chance.random() < 0.5:
                    headers += CHUNKED
                    body = chunk(body) + LAST_CHUNK if body else LAST_CHUNK
            await downstream.request(method, target, headers, body)
            if chance.random() < 0.05:
                # Leaves in the middle, now or a moment later.
                if chance.random() < 0.5:
                    await downstream.read_some(chance.randrange(1, 5000))
                (downstream.reset if chance.random() < 0.5 else downstream.close)()
                results["left"] += 1
                return False
            response = await downstream.read_response()
            if response.status == 502:
                assert kind in ("die", "cut"), (kind, response)
                results["502"] += 1
                return True
            assert response.header("X-Token") == token, "a head was mixed up"
            expected = b"" if method == "HEAD" else filler(token, size)
            if kind == "cut":
                assert not response.complete
                assert expected.startswith(response.body), "a body was mixed up"
                results["cut"] += 1
                return False
            assert response.complete
            assert response.status == (404 if kind == "404" else 200)
            assert response.body == expected, "a body was mixed up"
            results[f"{response.status}"] += 1
            return not response.has("Connection")

        async def client(number: int, count: int) -> None:
            downstream = None
            for n in range(count):
                if downstream is None:
                    downstream = await Downstream.connect(running.port, timeout=20)
                token = f"{number}.{n}.{chance.randrange(10**9)}"
                try:
                    usable = await ask(downstream, token)
                except (ConnectionError, WireClosed, WireTimeout) as exc:
                    raise AssertionError(f"{token}: {exc}") from exc
                assert seen[token] <= 2, "a request was repeated more than once"
                if not usable:
                    downstream.close()
                    downstream = None
            if downstream is not None:
                downstream.close()

        started = monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(CONNECTIONS):
                group.create_task(client(number, REQUESTS // CONNECTIONS))
        elapsed = monotonic() - started
        total = sum(results.values())
        print(f"{total} requests in {elapsed:.1f} s: {dict(results)}; upstream connections {upstream.accepted}")
        while draining.active_exchanges():
            await asyncio.sleep(0.01)
