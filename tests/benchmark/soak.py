"""A long mix of everything through the standalone proxy, and what it leaves behind: memory, descriptors, objects.

    python -m tests.benchmark.soak [SECONDS] [CONNECTIONS]

Ten minutes by default. GET, uploads of both framings, chunked downloads, HEAD, 404, and 5 % of clients that leave in
the middle. Fails when memory, descriptors or objects of the garbage collector grow with time after the first fifth, or
when an answer was wrong. The proxy is the same ``mount()``, with a handler beside it that counts objects.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from time import monotonic

import psutil

from tests.support.downstream import Downstream
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import LAST_CHUNK, chunk

CHECKOUT = Path(__file__).resolve().parents[2]
CHUNKED = [("Transfer-Encoding", "chunked")]
BODY = bytes(range(256)) * 4096
# What may grow in ten minutes.
RSS_SLOPE = 1 << 20
FDS_SLOPE = 5
OBJECTS_SLOPE = 1000


def serve(port: int, upstream: str) -> None:
    """Be the proxy: one mount, and /_objects beside it."""
    from tornado.web import Application, RequestHandler

    from tornado_proxy import mount

    class Objects(RequestHandler):
        def get(self) -> None:
            gc.collect()
            self.write(str(len(gc.get_objects())))

    async def run() -> None:
        rules = [(r"/_objects", Objects), mount("/", upstream)]
        Application(rules, log_function=lambda handler: None).listen(port, "127.0.0.1")  # type: ignore[arg-type]
        print("listening", flush=True)
        await asyncio.Event().wait()

    asyncio.run(run())


async def answer(conn, request) -> None:
    """Answer as the target says: /kind/size."""
    _, kind, size = request.target.split("/")
    body = BODY[: int(size)]
    if kind == "missing":
        await conn.respond(404, body=b"no such thing")
    elif kind == "chunked":
        await conn.send_head(200, CHUNKED)
        for start in range(0, len(body), 30_000):
            await conn.send_chunk(body[start : start + 30_000])
        await conn.send(LAST_CHUNK)
    elif kind == "upload":
        await conn.respond(200, body=str(len(request.body or b"")).encode())
    else:
        await conn.respond(200, [("Content-Type", "application/octet-stream")], body)
    # What the test's own upstream keeps is not the proxy's.
    conn.requests[:] = conn.requests[-1:]


async def client(port: int, until: float, chance: random.Random, results: Counter[str]) -> None:
    """Ask for one thing after the other, leaving now and then."""
    downstream = None
    while monotonic() < until:
        if downstream is None:
            downstream = await Downstream.connect(port, timeout=6)
        kind = chance.choices(("get", "upload", "chunked", "head", "missing"), (45, 20, 15, 10, 10))[0]
        size = chance.choice((0, 10, 1_000, 1_000, 20_000, 300_000, 1_000_000))
        method = {"upload": "POST", "head": "HEAD"}.get(kind, "GET")
        headers, body = [], None
        if kind == "upload":
            body = BODY[:size]
            if chance.random() < 0.5:
                headers, body = CHUNKED, (chunk(body) if body else b"") + LAST_CHUNK
        try:
            if chance.random() < 0.05:
                length = f"Content-Length: {size}\r\n" if kind == "upload" else ""
                sent = f"{method} /{kind}/{size} HTTP/1.1\r\nHost: h\r\n{length}\r\n".encode()
                if kind == "upload":
                    # Only a part of the body.
                    await downstream.send(sent + BODY[: chance.randrange(size + 1)])
                else:
                    await downstream.send(sent)
                    if chance.random() < 0.7:
                        await downstream.read_some(chance.randrange(1, 100_000))
                (downstream.close if chance.random() < 0.5 else downstream.reset)()
                downstream = None
                results["left"] += 1
                continue
            await downstream.request(method, f"/{kind}/{size}", headers, body)
            response = await downstream.read_response()
        except (AssertionError, ConnectionError) as error:
            results[f"failed: {kind} {size} {type(error).__name__}"] += 1
            if downstream is not None:
                downstream.close()
            downstream = None
            continue
        expected = {
            "get": BODY[:size],
            "chunked": BODY[:size],
            "upload": str(size).encode(),
            "head": b"",
            "missing": b"no such thing",
        }[kind]
        good = response.status == (404 if kind == "missing" else 200) and response.body == expected
        results[kind if good else f"wrong {kind}: {response.status}"] += 1
    if downstream is not None:
        downstream.close()


def slope(samples: list[tuple[float, float]]) -> float:
    """Return the growth in ten minutes of the line through the samples (least squares)."""
    mean_x = sum(x for x, _ in samples) / len(samples)
    mean_y = sum(y for _, y in samples) / len(samples)
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return 600 * sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread


async def soak(seconds: float, connections: int) -> int:
    """Run the mix, print a table, return the exit code."""
    chance = random.Random(3)
    results: Counter[str] = Counter()
    table: list[tuple[float, int, int, int]] = []
    async with ScriptedUpstream(timeout=60) as upstream:
        upstream.serve(answer)
        with subprocess.Popen(
            [sys.executable, "-m", "tests.benchmark.soak", "--serve", upstream.url],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                port = int((await asyncio.to_thread(process.stdout.readline)).split()[1])
                await asyncio.to_thread(process.stdout.readline)
                proxy = psutil.Process(process.pid)
                started = monotonic()
                clients = [
                    asyncio.ensure_future(client(port, started + seconds, chance, results)) for _ in range(connections)
                ]
                interval = max(seconds / 40, 1.0)
                print(f"{'s':>6} {'requests':>9} {'RSS MiB':>8} {'fds':>5} {'objects':>9}")
                while not all(task.done() for task in clients):
                    await asyncio.wait(clients, timeout=interval)
                    upstream.requests.clear()
                    upstream.connections[:] = [conn for conn in upstream.connections if conn.sock.fileno() >= 0]
                    async with await Downstream.connect(port, timeout=6) as downstream:
                        objects = int((await downstream.exchange("GET", "/_objects")).body)
                    row = (monotonic() - started, proxy.memory_info().rss, proxy.num_fds(), objects)
                    table.append(row)
                    total = sum(results.values())
                    print(f"{row[0]:6.0f} {total:9} {row[1] / 2**20:8.1f} {row[2]:5} {row[3]:9}", flush=True)
                for task in clients:
                    task.result()
            finally:
                process.terminate()
                process.wait(10)
    print(dict(results))
    settled = [row for row in table if row[0] > seconds / 5] or table
    failures = [f"{count} x {name}" for name, count in results.items() if name.startswith(("failed", "wrong"))]
    for name, column, limit in (("RSS", 1, RSS_SLOPE), ("fds", 2, FDS_SLOPE), ("objects", 3, OBJECTS_SLOPE)):
        growth = slope([(row[0], row[column]) for row in settled])
        # Noise of a short run: what it grew by in itself must show too.
        grown = growth * (settled[-1][0] - settled[0][0]) / 600
        print(f"{name}: {growth:+.0f} in ten minutes, {grown:+.0f} in this run")
        if growth > limit and grown > limit / 2:
            failures.append(f"{name} grows by {growth:.0f} in ten minutes")
    print("failed: " + "; ".join(failures) if failures else "ok")
    return 1 if failures else 0


def main() -> int:
    """Read the arguments; run the soak, or be its proxy."""
    if sys.argv[1:2] == ["--serve"]:
        from tests.support.process import free_port

        port = free_port()
        print("port", port, flush=True)
        serve(port, sys.argv[2])
        return 0
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    connections = int(sys.argv[2]) if len(sys.argv) > 2 else min(32, 8 * (os.cpu_count() or 1))
    return asyncio.run(soak(seconds, connections))


if __name__ == "__main__":
    sys.exit(main())
