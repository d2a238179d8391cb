"""Users with servers of their own: kernels, the command line and the browser work as on a laptop."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from playwright.sync_api import Page, expect

from jupyter_agents.client import AgentsError, Client

from .helpers import a_browser, events_of, open_lab, refusal, service_secret, socket_status
from .running import PASSWORD, Hub, User, token, wait_for

IN_A_KERNEL = """
import json, os
from jupyter_agents.client import Client
client = Client.discover()
client.create_agent("k")
run = client.start_run("k", "[[run echo I am with $(pwd); echo $NAME > who]]").wait()
print(json.dumps({
    "user": client.workspace()["user"],
    "url": client.url,
    "text": run.text,
    "agents": [a["id"] for a in client.agents()],
    "environment": dict(os.environ),
}))
"""


def test_three_kernels_at_once_each_have_their_users_workspace(hub: Hub, users: list[User]) -> None:
    with ThreadPoolExecutor() as pool:
        told = [json.loads(text) for text in pool.map(lambda user: user.execute(IN_A_KERNEL), users)]
    for user, answer in zip(users, told, strict=True):
        assert answer["user"] == user.name
        assert answer["url"].endswith(f"/user/{user.name}/")
        assert "I am with /workspace/agent-k" in answer["text"]
        assert answer["agents"] == ["k"]
        assert "DOCKER_HOST" not in answer["environment"]
        assert service_secret(hub) not in json.dumps(answer["environment"])
        assert "sk-of-the-service" not in json.dumps(answer["environment"])


def test_the_magic_works_unchanged(users: list[User]) -> None:
    printed = users[0].execute("%load_ext jupyter_agents\n%agent list")
    assert "k" in printed


def test_named_servers_share_their_users_workspace(hub: Hub, users: list[User]) -> None:
    wes = users[2]
    assert hub.api("POST", f"{wes.path}/servers/second").status_code in (201, 202)
    wait_for(lambda: wes.model()["servers"].get("second", {}).get("ready"), "the second server", 90)
    second = Client(f"{wes.server}/second", wes.token)
    assert second.start_workspace()["name"] == wes.client.start_workspace()["name"]
    assert hub.api("DELETE", f"{wes.path}/servers/second").status_code in (202, 204)


def test_another_users_server_is_closed(users: list[User]) -> None:
    uma, vic, _ = users
    for value in (vic.token, "garbage", vic.new_token(scopes=["access:services!service=jupyter-agents"])):
        client = Client(uma.server, value)
        assert refusal(client).status in (302, 403)
        assert refusal(client, "POST", "workspace").status == 403
        assert socket_status(uma.server, **token(value)) in (302, 403)


def test_the_browsers_cookie_needs_its_xsrf_token_and_its_origin(users: list[User]) -> None:
    uma = users[0]
    session = uma.login()
    session.get(f"{uma.server}/lab")
    page = {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Site": "same-origin"}
    answer = session.post(f"{uma.server}/jupyter-agents/workspace", headers=page)
    assert answer.status_code == 403
    xsrf = next(c.value for c in session.cookies if c.name == "_xsrf" and c.path.startswith("/base/user/"))
    answer = session.post(
        f"{uma.server}/jupyter-agents/workspace", headers={**page, "X-XSRFToken": str(xsrf).strip('"')}
    )
    assert answer.status_code == 200 and answer.json()["user"] == uma.name
    cookies = "; ".join(f"{c.name}={c.value}" for c in session.cookies if c.path.startswith(("/base/user/", "/")))
    assert socket_status(uma.server, Cookie=cookies, Origin="https://evil.example") in (403, 404)
    assert socket_status(uma.server, Cookie=cookies, Origin=uma.hub.url.removesuffix("/base")) == 101


def test_big_files_pass_in_both_directions(users: list[User], tmp_path: Any) -> None:
    vic = users[1].client
    if "big" not in [agent["id"] for agent in vic.agents()]:
        vic.create_agent("big")
    block = os.urandom(2**20)
    with (tmp_path / "up").open("wb") as file:
        for _ in range(300):
            file.write(block)
    vic.put("big", tmp_path / "up", "data/file")
    got = vic.get("big", "data/file", tmp_path / "down")
    assert got.stat().st_size == 300 * 2**20
    with got.open("rb") as file:
        assert all(file.read(2**20) == block for _ in range(300))


def test_events_pass_as_they_happen(users: list[User]) -> None:
    client = users[2].client
    run = client.start_run("k", "[[slow 10 0.3]]")
    times = [time.monotonic() for event in client.events(run.id, follow=True) if event["type"] == "stream_event"]
    assert times[-1] - times[0] > 2


def test_a_service_that_is_away_is_a_sentence_and_comes_back(hub: Hub, users: list[User]) -> None:
    client = users[0].client
    hub.service_process().kill()
    wait_for(lambda: client_error(client) == "service_unavailable", "the service is down", 5)
    wait_for(lambda: client_error(client) == "", "the service is back", 60)


def client_error(client: Client) -> str:
    try:
        client.workspace()
    except AgentsError as e:
        return e.reason
    return ""


def run_prompt(page: Page, agent: str, prompt: str) -> None:
    page.click(f'.jp-agents-agent-name:text-is("{agent}")', timeout=60_000)
    field = page.get_by_label(f"Prompt for {agent}", exact=True)
    field.fill(prompt)
    expect(page.locator(".jp-agents-run")).to_be_enabled(timeout=30_000)
    field.press("Control+Enter")  # JupyterLab's question about news may cover the button


def test_three_browsers_at_once_each_show_their_users_agents(hub: Hub, users: list[User]) -> None:
    with a_browser() as browser:
        for user in users:
            user.client.create_agent(f"of-{user.name}")
        pages = [open_lab(browser, user) for user in users]
        for page, user in zip(pages, users, strict=True):
            run_prompt(page, f"of-{user.name}", f"[[run echo hello from {user.name}, 6 times 7 is $((6*7))]]")
        for page, user in zip(pages, users, strict=True):
            expect(page.locator('.jp-agents-outcome[data-state="succeeded"]')).to_be_visible(timeout=60_000)
            expect(page.locator(".jp-agents-transcript")).to_contain_text(f"hello from {user.name}, 6 times 7 is 42")
            for other in users:
                if other is not user:
                    expect(page.locator(".jp-agents-panel")).not_to_contain_text(f"of-{other.name}")
            assert service_secret(hub) not in page.content()


def test_the_panel_says_that_the_service_is_away_and_goes_on_when_it_is_back(hub: Hub, users: list[User]) -> None:
    with a_browser() as browser:
        user = users[0]
        page = open_lab(browser, user)
        run_prompt(page, "k", "[[slow 40 0.2]]")
        expect(page.locator(".jp-agents-transcript")).to_contain_text("word003", timeout=30_000)
        hub.service_process().kill()
        expect(page.locator(".jp-agents-panel")).to_contain_text("service of this Hub does not answer", timeout=20_000)
        expect(page.locator(".jp-agents-transcript")).to_contain_text("word039", timeout=60_000)
        expect(page.locator('.jp-agents-outcome[data-state="succeeded"]')).to_be_visible(timeout=30_000)
        expect(page.locator(".jp-agents-panel")).not_to_contain_text("does not answer")


def test_the_administrators_page(hub: Hub, users: list[User]) -> None:
    with a_browser() as browser:
        users[2].client.start_workspace()
        page = browser.new_context().new_page()
        page.goto(f"{hub.url}/hub/login?next=/base/services/jupyter-agents/")
        page.fill("#username_input", hub.add_user("boss").name)
        page.fill("#password_input", PASSWORD)
        page.click("#login_submit")
        row = page.locator("tr", has_text=users[2].name)
        expect(row).to_contain_text("of 1024 MB")
        row.get_by_text("Stop").click()
        expect(row).to_contain_text("stopped")
        expect(row.get_by_text("Stop", exact=True)).to_have_count(0)
        assert users[2].client.workspace()["state"] == "stopped"
        users[2].client.create_agent("doomed")
        page.reload()
        page.locator("tr", has_text=users[2].name).get_by_text("Delete").click()
        expect(page.locator("h1")).to_have_text(f"Delete all agents and files of {users[2].name}?")
        page.get_by_role("button", name="Delete").click()
        expect(page.locator("h1")).to_have_text("Agent workspaces")
        expect(row).to_have_count(0)
        assert users[2].client.agents() == []


def test_a_killed_hub_loses_nothing(hub: Hub, users: list[User]) -> None:
    """The proxy and the users' servers live on; the service ends with the Hub, and starts with the next one."""
    client = users[1].client
    run = client.start_run("k", "[[slow 60 0.2]]")
    old = hub.service_process()
    hub.kill()
    wait_for(lambda: not old.is_running(), "the service has ended with its Hub")
    hub.start()
    events = events_of(client.watch(run.id))
    assert run.wait(30).status == "succeeded" and run.text.split()[-1] == "word059"
    assert events[-1]["type"] == "run_end"
