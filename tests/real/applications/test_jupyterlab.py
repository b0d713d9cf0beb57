"""JupyterLab: a kernel and a terminal, each over a websocket of its own."""

from __future__ import annotations

import json

import pytest

from tests.real.applications.behind import Behind, needs

pytestmark = needs("jupyter-lab")

NOTEBOOK = {
    "cells": [
        {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": "6*7"}
    ],
    "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}
SETTINGS = {
    # Its lines are then in the page, not only painted.
    "terminal-extension/plugin": {"screenReaderMode": True},
    # A question that would take the focus.
    "apputils-extension/notification": {"fetchNews": "false"},
}


@pytest.fixture
async def url(behind: Behind) -> str:
    (behind.directory / "answer.ipynb").write_text(json.dumps(NOTEBOOK))
    settings = behind.directory.parent / "settings"
    for name, values in SETTINGS.items():
        file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    upstream = await behind.start(
        *("jupyter-lab", "--no-browser", "--allow-root", "--port={port}", "--IdentityProvider.token=secret"),
        *("--ServerApp.base_url=/jupyter/", "--ServerApp.allow_remote_access=True"),
        env={"JUPYTERLAB_SETTINGS_DIR": str(settings), "SHELL": "/bin/sh"},
    )
    return await behind.mount("/jupyter", f"{upstream}/jupyter", preserve_host_header=True)


class TestBehindAPrefix:
    async def test_a_cell_runs(self, behind: Behind, url: str) -> None:
        page = behind.page
        await page.open(f"{url}/lab/tree/answer.ipynb?token=secret")
        await page.until("document.querySelector('.jp-Toolbar-kernelName')?.textContent === 'Python 3 (ipykernel)'")
        await page.until("document.querySelector('.jp-Notebook-ExecutionIndicator[data-status=idle]') !== null")
        await page.click("[data-command='notebook:run-cell-and-select-next']")
        await page.until("document.querySelector('.jp-OutputArea-executeResult .jp-OutputArea-output') !== null")
        assert (await page.text(".jp-OutputArea-executeResult .jp-OutputArea-output")).strip() == "42"

    async def test_a_terminal_runs_a_command(self, behind: Behind, url: str) -> None:
        page = behind.page
        await page.open(f"{url}/lab?token=secret")
        await page.click(".jp-LauncherCard[title*=terminal]")
        await page.until("document.querySelector('.xterm-accessibility-tree')?.textContent.includes('#')")
        await page.click(".xterm-screen")
        await page.until("document.activeElement.matches('.xterm-helper-textarea')")
        await page.type("expr 6 '*' 7")
        await page.press_enter()
        lines = "[...document.querySelectorAll('.xterm-accessibility-tree > *')].map((line) => line.textContent.trim())"
        await page.until(f"{lines}.includes('42')")
