"""An application, a proxy in front of it under a prefix, and a browser in front of both."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.real.applications.behind import Behind
from tests.real.chromium import Chromium
from tests.support.proxy import ProxyFactory

PICTURES = os.environ.get("TORNADO_PROXY_PICTURES")


@pytest.fixture
async def behind(tmp_path: Path, proxy: ProxyFactory, request: pytest.FixtureRequest) -> AsyncIterator[Behind]:
    """A browser, and what starts the rest. Once the test is over, every tunnel must have ended well."""
    setting = Behind(tmp_path, proxy)
    try:
        async with Chromium(tmp_path) as setting.page:
            yield setting
            if PICTURES:
                await setting.page.screenshot(Path(PICTURES) / f"{request.node.name}.png")
        await setting.check_tunnels()
    finally:
        await setting.stop()
