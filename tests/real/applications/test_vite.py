"""Vite's development server: the page follows the files, told so over a websocket."""

from __future__ import annotations

from tests.real.applications.behind import Behind, needs

pytestmark = needs("vite")

PAGE = """
<!doctype html>
<link rel="icon" href="data:,">
<title>Hot</title>
<h1></h1>
<script type="module" src="/main.js"></script>
"""
SCRIPT = """
import { title } from "./title.js";
import "./style.css";
const show = (text) => { document.querySelector("h1").textContent = text; };
show(title);
import.meta.hot.accept("./title.js", (changed) => show(changed.title));
"""


class TestBehindAPrefix:
    async def test_the_page_follows_the_files_without_a_reload(self, behind: Behind) -> None:
        files, page = behind.directory, behind.page
        (files / "index.html").write_text(PAGE)
        (files / "main.js").write_text(SCRIPT)
        (files / "title.js").write_text('export const title = "before";')
        (files / "style.css").write_text("h1 { color: rgb(200, 0, 0) }")
        upstream = await behind.start(*("vite", "--host=127.0.0.1", "--port={port}", "--strictPort", "--base=/vite/"))
        url = await behind.mount("/vite", f"{upstream}/vite")
        await page.open(f"{url}/")
        await page.until("document.querySelector('h1').textContent === 'before'")
        await page.value("window.loadedOnce = true")

        (files / "title.js").write_text('export const title = "after";')
        await page.until("document.querySelector('h1').textContent === 'after'")
        (files / "style.css").write_text("h1 { color: rgb(0, 120, 0) }")
        await page.until("getComputedStyle(document.querySelector('h1')).color === 'rgb(0, 120, 0)'")
        assert await page.value("window.loadedOnce")
        assert page.complaints == []

    async def test_a_changed_page_is_reloaded(self, behind: Behind) -> None:
        files, page = behind.directory, behind.page
        (files / "index.html").write_text("<!doctype html><h1>before</h1>")
        upstream = await behind.start(*("vite", "--host=127.0.0.1", "--port={port}", "--strictPort", "--base=/vite/"))
        url = await behind.mount("/vite", f"{upstream}/vite")
        await page.open(f"{url}/")
        await page.until("document.querySelector('h1').textContent === 'before'")
        await page.value("window.loadedOnce = true")
        (files / "index.html").write_text("<!doctype html><h1>after</h1>")
        await page.until("document.querySelector('h1')?.textContent === 'after'")
        assert not await page.value("window.loadedOnce")
