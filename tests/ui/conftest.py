"""A real JupyterLab with the built side panel, and Chromium to look at it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import nbformat
import pytest
import requests
from conftest import ROOT, clean_up
from helpers import CHROMIUM_FLAGS
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, Error, Locator, Page, expect, sync_playwright

IMAGES = ROOT / "docs" / "images"
SECONDS = 1000.0
expect.set_options(timeout=45 * SECONDS)


class Lab:
    """A JupyterLab server that can die and come back at the same address."""

    def __init__(self, user: str, folder: Path, environment: Path = Path(sys.prefix), **config: Any):
        """`environment` is where Python and all packages are, and all that its PATH leads to."""
        self.user = user
        self._bin = environment / "bin"
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.token = secrets.token_hex(8)
        self.url = f"http://127.0.0.1:{self.port}"
        settings = {
            "ServerApp": {"port": self.port, "allow_root": True, "root_dir": str(self.work), "open_browser": False},
            "IdentityProvider": {"token": self.token},
            "JupyterAgents": {"user": user},
            "LabApp": {"expose_app_in_browser": True},
            "JupyterNotebookApp": {"expose_app_in_browser": True},
        }
        for section, values in config.items():
            settings.setdefault(section, {}).update(values)
        (folder / "config.json").write_text(json.dumps(settings))
        # Lab's questions, whether one wants its news and which kernel, would lie over what is looked at.
        for name, values in {
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "notebook-extension/tracker": {"autoStartDefaultKernel": True},
        }.items():
            path = folder / f"CONFIG/lab/user-settings/@jupyterlab/{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(values))
        self.start()

    def start(self) -> None:
        places = {f"JUPYTER_{name}_DIR": str(self.folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
        command = [self._bin / "python", "-m", "jupyterlab", f"--config={self.folder / 'config.json'}"]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **places, "PATH": str(self._bin)}, cwd=self.folder, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                requests.get(f"{self.url}/api", timeout=5)
                return
            except requests.ConnectionError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, "the server doesn't start"
                time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def call(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        headers = {"Authorization": f"token {self.token}"}
        return requests.request(method, f"{self.url}/jupyter-agents/{path}", headers=headers, timeout=120, **kwargs)

    def clear(self) -> None:
        """Remove all agents."""
        for agent in self.call("GET", "agents").json():
            assert self.call("DELETE", f"agents/{agent['id']}").ok


@pytest.fixture(autouse=True)
def jp_asyncio_loop() -> None:
    """None of pytest-jupyter's: Playwright has a loop of its own running here."""


@pytest.fixture(autouse=True)
def jp_server_cleanup() -> None:
    """There is no server in this process."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "Chromium must be there"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def start_lab(
    docker_api: docker.APIClient, model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Lab]]:
    """Servers, each with a user of its own, of whom nothing is left."""
    started: list[Lab] = []

    def start(**config: Any) -> Lab:
        started.append(Lab(f"test-{secrets.token_hex(4)}", tmp_path_factory.mktemp("lab"), **config))
        return started[-1]

    yield start
    for lab in started:
        lab.stop()
        clean_up(docker_api, lab.user)


def notebook(*cells: str) -> str:
    """A notebook file with these cells, for Python."""
    made = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return str(nbformat.writes(made))


@pytest.fixture(scope="module")
def the_lab(start_lab: Callable[..., Lab]) -> Lab:
    return start_lab()


@pytest.fixture
def lab(the_lab: Lab) -> Lab:
    the_lab.clear()
    return the_lab


class View:
    """A tab of the browser with the side panel in it."""

    def __init__(self, browser: Browser, lab: Lab, path: str = "lab?reset", **options: Any):
        options = {"viewport": {"width": 1360, "height": 900}, **options}
        self.page: Page = browser.new_context(**options).new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(f"{error} {getattr(error, 'stack', '')}"))
        self.lab = lab
        self.open(path)

    def open(self, path: str = "lab") -> None:
        # The token goes once, for the cookie, so that what follows is as with any user's browser.
        # Chromium gives up what it loads when some container's network interface appears or goes.
        for attempt in range(3):
            try:
                self.page.goto(f"{self.lab.url}/login?token={self.lab.token}")
                self.page.goto(f"{self.lab.url}/{path}")
                self.page.wait_for_selector("#jp-main-dock-panel, #main-panel", timeout=40 * SECONDS)
                break
            except Error:
                if attempt == 2:
                    raise

    def __getitem__(self, selector: str) -> Locator:
        """An element of the panel, by its class after `jp-agents-`, or by any selector."""
        return self.page.locator(selector if selector[0] in ".#[" else f".jp-agents-{selector}")

    def command(self, name: str, **arguments: Any) -> None:
        self.page.wait_for_function("name => window.jupyterapp?.commands.hasCommand(name)", arg=name)
        self.page.evaluate("([name, args]) => void window.jupyterapp.commands.execute(name, args)", [name, arguments])

    def show(self) -> View:
        self.command("jupyter-agents:show")
        expect(self["create-name"]).to_be_visible()
        return self

    def create(self, name: str) -> None:
        expect(self["create-name"]).to_be_enabled()
        self["create-name"].fill(name)
        self["create-name"].press("Enter")
        expect(self["prompt-text"]).to_have_attribute("aria-label", f"Prompt for {name}")

    def prompt(self, text: str) -> None:
        expect(self["prompt-text"]).to_be_enabled()
        self["prompt-text"].fill(text)
        expect(self["run"]).to_be_enabled()
        self["prompt-text"].press("Control+Enter")

    def run(self, text: str, state: str = "Succeeded") -> None:
        self.prompt(text)
        expect(self["user"]).to_contain_text(text[:200])
        self.outcome(state)

    def outcome(self, state: str) -> None:
        expect(self["outcome"].locator("[role=status]")).to_have_text(state)

    def tab(self, name: str) -> None:
        self[f"#jp-agents-tab-{name}"].click()

    def widen(self) -> None:
        """Make room for the panel, as one does for a picture."""
        box = self["panel"].bounding_box()
        assert box
        self.page.mouse.move(box["x"] - 2, 300)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] - 240, 300, steps=5)
        self.page.mouse.up()

    def picture(self, name: str) -> None:
        """A picture for the documents, taken only when asked for: the tests leave the tree as it is."""
        if os.environ.get("UPDATE_SCREENSHOTS"):
            IMAGES.mkdir(exist_ok=True)
            self.page.wait_for_timeout(500)  # bars grow slowly
            self.page.screenshot(path=IMAGES / f"{name}.png")

    def close(self) -> None:
        self.page.context.close()


@pytest.fixture
def look(browser: Browser, lab: Lab) -> Iterator[Callable[..., View]]:
    """Open tabs on the panel. None of our code may throw an error in them."""
    opened: list[View] = []

    def view(path: str = "lab?reset", **options: Any) -> View:
        opened.append(View(browser, lab, path, **options).show())
        return opened[-1]

    yield view
    errors = [error for one in opened for error in one.errors if "jupyter-agents" in error]
    for one in opened:
        one.close()
    assert errors == []
