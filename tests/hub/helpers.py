"""What tests of the Hub share: looks at containers and answers, and a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docker
import pytest
import websocket
from helpers import CHROMIUM_FLAGS
from playwright.sync_api import Browser, Page, expect, sync_playwright

from jupyter_agents.client import AgentsError, Client

from .running import PASSWORD, Hub, User


def container_of(deployment: str, user: str, docker_api: docker.APIClient) -> dict[str, Any] | None:
    labels = [f"jupyter-agents.deployment={deployment}", f"jupyter-agents.user={user}"]
    found = docker_api.containers(filters={"label": labels})
    assert len(found) < 2
    return dict(docker_api.inspect_container(found[0]["Id"])) if found else None


def service_secret(hub: Hub) -> str:
    return hub.service_process().environ()["JUPYTERHUB_API_TOKEN"]


def refusal(client: Client, method: str = "GET", path: str = "workspace") -> AgentsError:
    with pytest.raises(AgentsError) as refused:
        client._request(method, path, json={})
    return refused.value


def socket_status(url: str, **headers: str) -> int:
    """How the handshake of a WebSocket ends; 101 if it succeeds."""
    address = f"ws{url.removeprefix('http')}/jupyter-agents/events"
    options = {"origin": headers.pop("Origin")} if "Origin" in headers else {"suppress_origin": True}
    try:
        websocket.create_connection(address, header=headers, timeout=10, **options).close()
    except websocket.WebSocketBadStatusException as e:
        return e.status_code
    return 101


def events_of(messages: Any) -> list[dict[str, Any]]:
    return [event for message in messages if message and message["type"] == "events" for event in message["events"]]


@contextmanager
def a_browser() -> Iterator[Browser]:
    """Chromium. Not a fixture: Playwright's event loop would run while those of other fixtures want to."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


def open_panel(browser: Browser, user: User) -> Page:
    """JupyterLab of a user who logs in at the Hub, with the panel open."""
    page = browser.new_context().new_page()
    # On a busy machine JupyterLab's theme may be too slow for it.
    page.add_locator_handler(page.locator(".jp-Dialog"), lambda: page.keyboard.press("Escape"))
    page.goto(f"{user.hub.url}/hub/login?next=/base/user/{user.name}/lab%3Freset")  # without the panel at first
    page.fill("#username_input", user.name)
    page.fill("#password_input", PASSWORD)
    page.click("#login_submit")
    tab = page.locator('[data-id="jupyter-agents-panel"]')
    expect(tab).to_be_visible(timeout=60_000)
    tab.click()
    return page


def open_lab(browser: Browser, user: User) -> Page:
    """The same, with a workspace that works."""
    page = open_panel(browser, user)
    expect(page.locator(".jp-agents-create-name")).to_be_enabled(timeout=60_000)
    return page
