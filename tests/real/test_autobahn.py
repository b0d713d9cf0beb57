"""Autobahn's fuzzing client gives the same verdicts through the proxy as directly.

It runs on Python 2 only, so it is named by a command, as in::

    TORNADO_PROXY_WSTEST="python2.7 -m autobahntestsuite.wstest" pytest tests/real/test_autobahn.py

``TORNADO_PROXY_WSTEST_CASES`` chooses others than the default, ``1.*`` to ``10.*``; ``12.* 13.*`` take many minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex

import pytest

from tests.support.process import StandaloneProxy

websockets = pytest.importorskip("websockets", reason="websockets is not installed")

from websockets.asyncio.server import serve  # noqa: E402
from websockets.exceptions import ConnectionClosed  # noqa: E402

WSTEST = os.environ.get("TORNADO_PROXY_WSTEST")
CASES = os.environ.get("TORNADO_PROXY_WSTEST_CASES", " ".join(f"{number}.*" for number in range(1, 11)))

pytestmark = pytest.mark.skipif(WSTEST is None, reason="TORNADO_PROXY_WSTEST does not name Autobahn's wstest")


async def echo(server):
    with contextlib.suppress(ConnectionClosed):
        async for message in server:
            await server.send(message)


def verdicts(index: dict[str, dict[str, object]]) -> dict[str, tuple[object, ...]]:
    """Return the verdict of each case. Whether an echo overtakes a failure (NON-STRICT) is a matter of timing."""
    return {
        case: (str(seen["behavior"]).replace("NON-STRICT", "OK"), seen["behaviorClose"], seen["remoteCloseCode"])
        for case, seen in index.items()
    }


@pytest.mark.slow
async def test_verdicts_are_the_same_through_the_proxy(tmp_path):
    """UP-01."""
    async with serve(echo, "127.0.0.1", 0, max_size=None, ping_interval=None) as server:
        port = server.sockets[0].getsockname()[1]
        starting = StandaloneProxy("--to", f"http://127.0.0.1:{port}")
        proxy = await asyncio.to_thread(starting.__enter__)
        try:
            agents = [("direct", port), ("proxy", proxy.port)]
            spec = {
                "outdir": str(tmp_path),
                "servers": [{"agent": agent, "url": f"ws://127.0.0.1:{number}"} for agent, number in agents],
                "cases": CASES.split(),
                "exclude-cases": [],
                "exclude-agent-cases": {},
            }
            (tmp_path / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
            command = [*shlex.split(WSTEST), "-m", "fuzzingclient", "-s", str(tmp_path / "spec.json")]
            wstest = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
            )
            assert await wstest.wait() == 0
        finally:
            await asyncio.to_thread(proxy.stop)
    index = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert len(index["direct"]) > 0
    assert verdicts(index["proxy"]) == verdicts(index["direct"])
