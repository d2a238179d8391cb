"""A service that the Hub doesn't start, as the documents have it, and grants that are missing."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import requests
from playwright.sync_api import expect

from .helpers import a_browser, open_panel, refusal
from .running import Hub, token, wait_for

TOKEN = secrets.token_hex(16)
ACCESS = "access:services!service=jupyter-agents"
WITHOUT_GRANTS = """
c.JupyterHub.load_roles = [
    {**role, "scopes": ["list:users", "read:servers"]} if role["name"] == "jupyter-agents-service" else role
    for role in c.JupyterHub.load_roles
]
c.Spawner.server_token_scopes = ["users:activity!user", "access:servers!server"]
"""


@pytest.fixture(scope="module")
def hub(start_hub: Callable[..., Hub]) -> Iterator[Hub]:
    hub = start_hub(service_token=TOKEN, hub_config=WITHOUT_GRANTS)
    environment = {
        **os.environ,
        "JUPYTERHUB_API_TOKEN": TOKEN,
        "JUPYTERHUB_API_URL": f"http://127.0.0.1:{hub.port + 1}/base/hub/api",
        "JUPYTERHUB_BASE_URL": "/base/",
    }
    command = [sys.executable, "-m", "jupyter_agents.cli", "hub", f"--config={hub.service_config}"]
    with (
        (hub.directory / "service.log").open("wb") as log,
        subprocess.Popen(
            [*command, f"--AgentsHub.url={hub.service_at}"], env=environment, stdout=log, stderr=log
        ) as service,
    ):
        wait_for(lambda: requests.get(f"{hub.service}/health").ok, "the service answers through the proxy")
        yield hub
        service.terminate()
    hub.stop()


def test_an_external_service_works(hub: Hub) -> None:
    ann = hub.add_user("external-ann")
    ann.direct.create_agent("a")
    assert ann.direct.start_run("a", "[[say hello]]").wait(60).text == "hello"
    boss = hub.add_user("boss")
    page = boss.login().get(f"{hub.service}/")
    assert page.ok and ann.name in page.text
    listed = requests.get(f"{hub.service}/workspaces", headers=token(boss.new_token())).json()
    assert [workspace["user"] for workspace in listed] == [ann.name]


def test_what_the_service_may_not_is_in_its_log_from_the_start(hub: Hub) -> None:
    told = "lacks the scopes read:users:groups, users:activity: give them to it by a role in c.JupyterHub.load_roles"
    wait_for(lambda: told in (hub.directory / "service.log").read_text(), "the missing scopes are named")


def test_a_server_whose_token_lacks_the_scope_says_so_in_the_panel(hub: Hub) -> None:
    (ann,) = hub.add_users("external-ann")
    error = refusal(ann.client)
    assert error.reason == "missing_scope" and ACCESS in error.message
    with a_browser() as browser:
        panel = open_panel(browser, ann).locator(".jp-agents-panel")
        expect(panel).to_contain_text(f"Your token lacks the scope {ACCESS}: restart your server", timeout=60_000)
