"""The fixtures of all tests: an upstream, a proxy in front of it, and a log without surprises."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support.certificates import OPENSSL, Certificates, make_certificates
from tests.support.logs import LogGuard
from tests.support.process import StandaloneProxy
from tests.support.upstream import EchoUpstream, ScriptedUpstream

if TYPE_CHECKING:
    from tests.support.proxy import ProxyFactory


@pytest.fixture(autouse=True)
def expect_log() -> Iterator[LogGuard]:
    """Declare a log line at WARNING or above; without that, one fails the test."""
    guard = LogGuard()
    logging.getLogger().addHandler(guard)
    try:
        yield guard
    finally:
        logging.getLogger().removeHandler(guard)
    guard.check()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A certificate authority of our own, and what it certified."""
    if OPENSSL is None:
        pytest.skip("openssl, which makes the certificates, is not installed")
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def upstreams() -> list[ScriptedUpstream]:
    """The upstreams of this test; the ``proxy`` fixture looks at them after it has stopped."""
    return []


@pytest.fixture
async def upstream(upstreams: list[ScriptedUpstream]) -> AsyncIterator[ScriptedUpstream]:
    """An upstream that the test drives by hand."""
    async with ScriptedUpstream() as scripted:
        upstreams.append(scripted)
        yield scripted


@pytest.fixture
async def echo(upstreams: list[ScriptedUpstream]) -> AsyncIterator[EchoUpstream]:
    """An upstream that answers by itself with what it saw."""
    async with EchoUpstream() as echoing:
        upstreams.append(echoing)
        yield echoing


@pytest.fixture
async def proxy(
    upstreams: list[ScriptedUpstream], upstream: ScriptedUpstream, echo: EchoUpstream
) -> AsyncIterator[ProxyFactory]:
    """Start proxies: ``running = await proxy(upstream.url, **options)``.

    They are stopped, and checked for what they left behind, before the upstreams.
    """
    # Imported here, so that unit tests load neither pycurl nor a server.
    from tests.support.proxy import ProxyFactory

    factory = ProxyFactory(upstreams)
    try:
        yield factory
    finally:
        await factory.stop()


@pytest.fixture(params=[{}], ids=[""])
async def served(request: pytest.FixtureRequest) -> AsyncIterator[tuple[ScriptedUpstream, StandaloneProxy]]:
    """An upstream and the standalone proxy in front of it, which has the environment of the parameter."""
    async with ScriptedUpstream() as upstream:
        starting = StandaloneProxy("--to", upstream.url, env=request.param)
        proxy = await asyncio.to_thread(starting.__enter__)
        try:
            yield upstream, proxy
        finally:
            await asyncio.to_thread(proxy.signal, 9)
            await asyncio.to_thread(proxy.stop)
