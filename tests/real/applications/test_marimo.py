"""marimo: what a widget changes comes back over a websocket, as an application and as a notebook."""

from __future__ import annotations

import pytest

from tests.real.applications.behind import Behind, needs

pytestmark = needs("marimo")

NOTEBOOK = """
import marimo

app = marimo.App()


@app.cell
def _():
    import marimo as mo

    return (mo,)


@app.cell
def _(mo):
    clicks = mo.ui.button(label="Add one", value=0, on_click=lambda value: value + 1)
    clicks
    return (clicks,)


@app.cell
def _(clicks, mo):
    mo.md(f"# Clicked {clicks.value} times")
    return


if __name__ == "__main__":
    app.run()
"""


class TestBehindAPrefix:
    @pytest.mark.parametrize("mode", ["run", "edit"])
    async def test_a_click_changes_the_page(self, behind: Behind, mode: str) -> None:
        (behind.directory / "notebook.py").write_text(NOTEBOOK)
        (behind.directory / "pyproject.toml").write_text("[tool.marimo.runtime]\nauto_instantiate = true\n")
        upstream = await behind.start(
            *("marimo", mode, "notebook.py", "--headless", "--no-token", "--host=127.0.0.1", "--port={port}"),
            "--base-url=/marimo",
        )
        url = await behind.mount("/marimo", f"{upstream}/marimo")
        page = behind.page
        await page.open(f"{url}/")
        await page.until("document.querySelector('h1')?.textContent.trim() === 'Clicked 0 times'")
        for count in (1, 2):
            await page.click_on("document.querySelector('marimo-button').shadowRoot.querySelector('button')")
            await page.until(f"document.querySelector('h1')?.textContent.trim() === 'Clicked {count} times'")
