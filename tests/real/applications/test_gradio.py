"""Gradio: what a generator yields comes as server-sent events, one by one."""

from __future__ import annotations

from tests.real.applications.behind import Behind, needs

pytestmark = needs("gradio")

# It goes on only when it is told that the page shows what it said.
SCRIPT = """
import time
from pathlib import Path

import gradio


def count():
    for number in range(1, 4):
        yield f"{number} of 3"
        while not Path(f"seen-{number}").exists():
            time.sleep(0.02)


with gradio.Blocks() as demo:
    button = gradio.Button("Count", elem_id="count")
    button.click(count, outputs=gradio.Textbox(elem_id="counted"))

if __name__ == "__main__":
    demo.launch(root_path="/gradio")
"""


class TestBehindAPrefix:
    async def test_each_event_shows_before_the_next_is_made(self, behind: Behind) -> None:
        behind.websockets = False
        (behind.directory / "page.py").write_text(SCRIPT)
        upstream = await behind.start(
            *("gradio", "page.py"), env={"GRADIO_SERVER_PORT": "{port}", "GRADIO_ANALYTICS_ENABLED": "False"}
        )
        url = await behind.mount("/gradio", upstream)
        page = behind.page
        await page.open(f"{url}/")
        await page.click("#count")
        for number in (1, 2, 3):
            await page.until(f"document.querySelector('#counted textarea').value === '{number} of 3'")
            (behind.directory / f"seen-{number}").touch()
