"""A websocket handshake by hand, for tests in which no frame needs to be one."""

from __future__ import annotations

from tests.support.downstream import Downstream
from tests.support.proxy import RunningProxy
from tests.support.upstream import ScriptedUpstream, UpstreamConnection
from tests.support.wire import Pairs, build_head
from tornado_proxy.handshake import accept_value

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ASK = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", KEY),
]
GRANT = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Accept", accept_value(KEY))]
ASKING = build_head("GET /ws HTTP/1.1", [("Host", "h"), *ASK])
GRANTING = build_head("HTTP/1.1 101 Switching Protocols", GRANT)


async def opened(
    running: RunningProxy, upstream: ScriptedUpstream, target: str = "/ws", headers: Pairs = ()
) -> tuple[Downstream, UpstreamConnection]:
    """Return both ends of a new tunnel."""
    downstream = await running.ask("GET", target, [*ASK, *headers])
    conn, _ = await upstream.request()
    await conn.send_head(101, GRANT)
    assert (await downstream.read_head()).status == 101
    return downstream, conn


async def opened_through(port: int, upstream: ScriptedUpstream) -> tuple[Downstream, UpstreamConnection]:
    """Return both ends of a new tunnel through the proxy on `port`."""
    downstream = await Downstream.connect(port)
    await downstream.request("GET", "/ws?secret", ASK)
    conn, _ = await upstream.request()
    await conn.send_head(101, GRANT)
    assert (await downstream.read_head()).status == 101
    return downstream, conn
