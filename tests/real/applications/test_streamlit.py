"""Streamlit: what a click changes comes back over a websocket, and files go up beside it."""

from __future__ import annotations

from tests.real.applications.behind import Behind, needs

pytestmark = needs("streamlit")

SCRIPT = """
import streamlit as st

st.session_state.setdefault("count", 0)
if st.button("Add one"):
    st.session_state.count += 1
st.header(f"Clicked {st.session_state.count} times")
if file := st.file_uploader("A file"):
    st.subheader(f"It holds {len(file.getvalue())} bytes")
"""
SIZE = 3_000_000


class TestBehindAPrefix:
    async def test_a_click_changes_the_page_and_a_file_goes_up(self, behind: Behind) -> None:
        (behind.directory / "page.py").write_text(SCRIPT)
        (behind.directory / "file.bin").write_bytes(bytes(SIZE))
        upstream = await behind.start(
            *("streamlit", "run", "page.py", "--server.address=127.0.0.1", "--server.port={port}"),
            *("--server.headless=true", "--browser.gatherUsageStats=false", "--server.baseUrlPath=/streamlit"),
        )
        url = await behind.mount("/streamlit", f"{upstream}/streamlit", preserve_host_header=True)
        page = behind.page
        await page.open(f"{url}/")
        await page.until("document.querySelector('h2')?.textContent === 'Clicked 0 times'")
        for count in (1, 2):
            await page.click("[data-testid=stButton] button")
            await page.until(f"document.querySelector('h2').textContent === 'Clicked {count} times'")

        await page.attach("[data-testid=stFileUploader] input[type=file]", behind.directory / "file.bin")
        await page.until(f"document.querySelector('h3')?.textContent === 'It holds {SIZE} bytes'")
