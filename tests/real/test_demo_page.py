"""The demo page in a browser, through the proxy: what a newcomer sees after ``./demo/run``."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.real.chromium import CHROMIUM, Chromium
from tests.support.process import StandaloneProxy

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.slow,
]
# A directory to keep pictures of the page in, to look at.
PICTURES = os.environ.get("TORNADO_PROXY_PICTURES")


@pytest.fixture
async def page(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Chromium]:
    """The demo page, open."""
    starting = StandaloneProxy("--demo")
    proxy = await asyncio.to_thread(starting.__enter__)
    try:
        async with Chromium(tmp_path) as browser:
            await browser.open(re.findall(r"open (\S+) in a browser", proxy.output)[0])
            yield browser
            if PICTURES:
                await browser.screenshot(Path(PICTURES) / f"{request.node.name}.png")
    finally:
        await asyncio.to_thread(proxy.stop)


class TestEvents:
    async def test_arrive_one_by_one_with_the_time_of_each(self, page: Chromium) -> None:
        await page.choose("#events-rate", "10")
        await page.until("document.querySelectorAll('#events-rows tr').length >= 12")
        assert await page.text("#events-state") == "streaming"
        rows = await page.value(
            "[...document.querySelectorAll('#events-rows tr')].map((row) => [...row.cells].map((c) => c.textContent))"
        )
        numbers = [int(row[0]) for row in rows]
        assert numbers == sorted(numbers, reverse=True)
        for _, sent, arrived, delay in rows:
            assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}", sent)
            assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}", arrived)
            assert re.fullmatch(r"-?[\d.]+ ms", delay)
        # They were not held back and then delivered together.
        assert len({row[2] for row in rows}) > len(rows) // 2
        assert re.fullmatch(r"-?[\d.]+ ms", await page.text("#delay-median"))
        assert await page.value("document.querySelectorAll('#delay-chart polyline').length") == 1

    async def test_stop_and_go_on(self, page: Chromium) -> None:
        await page.until("Number(document.querySelector('#events-count').textContent) > 0")
        await page.click("#events-toggle")
        await page.until("document.querySelector('#events-state').textContent === 'paused'")
        seen = await page.text("#events-count")
        await page.click("#events-toggle")
        await page.until(f"Number(document.querySelector('#events-count').textContent) > {seen}")
        assert page.complaints == []


class TestTransfers:
    @pytest.mark.parametrize(("kind", "size"), [("download", 64), ("upload", 16)])
    async def test_complete_with_progress(self, page: Chromium, kind: str, size: int) -> None:
        await page.choose(f"#{kind}-size", str(size * 1024 * 1024))
        await page.click(f"#{kind}-start")
        await page.until(f"document.querySelector('#{kind}-state').textContent.includes('complete')")
        said = await page.text(f"#{kind}-state")
        assert re.fullmatch(rf"{size}\.0 MiB of {size}\.0 MiB at \d+ MiB/s, complete in [\d.]+ s", said)
        assert await page.value(f"document.querySelector('#{kind}-progress').value") == 1
        counted = "#upstream-sent" if kind == "download" else "#upstream-received"
        await page.until(f"document.querySelector('{counted}').textContent === '{size}.0 MiB'")
        assert re.fullmatch(r"[\d.]+ MiB", await page.text("#memory-now"))
        assert page.complaints == []

    async def test_a_slow_download_can_be_cancelled(self, page: Chromium) -> None:
        await page.choose("#download-speed", "2097152")
        await page.click("#download-start")
        await page.until("document.querySelector('#download-progress').value > 0")
        await page.click("#download-cancel")
        await page.until("document.querySelector('#download-state').textContent.startsWith('cancelled after')")
        assert not await page.value("document.querySelector('#download-start').disabled")


ANSWERS = {
    "status/200": ("200 OK", ["said by the upstream itself"]),
    "status/404": ("404 Not Found", ["said by the upstream itself", "x-said-by"]),
    "status/500": ("500 Internal Server Error", ["said by the upstream itself"]),
    "echo": ("200 OK", ["X-Forwarded-For: 127.0.0.1", "Via: 1.1 tornado_proxy"]),
    "refused": ("502 Bad Gateway", ["502: Bad Gateway"]),
    "slow-head": ("504 Gateway Timeout", ["504: Gateway Timeout"]),
    "truncated": ("200 OK", ["400 bytes of body", "The browser reports: TypeError", "forty bytes of text"]),
}


class TestPlayground:
    async def test_each_button_shows_its_answer(self, page: Chromium) -> None:
        buttons = await page.value("[...document.querySelectorAll('#playground button')].map((b) => b.dataset.path)")
        assert buttons == list(ANSWERS)
        for path, (title, words) in ANSWERS.items():
            await page.click(f'#playground button[data-path="{path}"]')
            await page.until(f"document.querySelector('#answer h3 small')?.textContent.startsWith('GET /{path} ')")
            shown = await page.text("#answer")
            assert shown.startswith(title), shown
            assert [word for word in words if word not in shown] == []


class TestLook:
    @pytest.mark.parametrize("width", [360, 1280])
    async def test_nothing_is_wider_than_the_window(self, page: Chromium, width: int) -> None:
        await page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        await page.click('#playground button[data-path="echo"]')
        await page.until("document.querySelector('#answer h3') !== null")
        await page.until("document.querySelectorAll('#events-rows tr').length >= 3")
        for element in ("document.documentElement", "document.querySelector('.table')"):
            assert await page.value(f"{element}.scrollWidth - {element}.clientWidth") == 0
