"""The service of a real Hub: who gets in, who gets what, what holds."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from urllib.parse import quote

import pytest
import requests

from jupyter_agents.client import AgentsError, Client
from jupyter_agents.hub import cli

from .helpers import container_of, events_of, refusal, service_secret, socket_status
from .running import Hub, User, token, wait_for
from .spying import WHERE, program

GB = 2**30


CALLS = [
    ("GET", "workspace"),
    ("POST", "workspace"),
    ("DELETE", "workspace?volume=1"),
    ("POST", "agents"),
    ("GET", "agents/a/files/x"),
    ("PUT", "agents/a/files/x"),
    ("PATCH", "agents/a/env"),
    ("POST", "agents/a/runs"),
    ("GET", "runs"),
    ("GET", "runs/20260101-000000-00000000/events"),
    ("GET", "openapi.yaml"),
]


def test_wrong_credentials_are_refused_everywhere(hub: Hub) -> None:
    ann = hub.add_user("ann")
    expired = ann.new_token(expires_in=1)
    credentials = {
        "none": "",
        "garbage": "garbage",
        "no scope": ann.new_token(scopes=["access:servers!user=ann"]),
        "another service": hub.stranger_token,
        "an administrator": hub.admin_token,
        "expired": expired,
    }
    wait_for(lambda: requests.get(f"{hub.url}/hub/api/user", headers=token(expired)).status_code == 403, "expired")
    for kind, value in credentials.items():
        headers = token(value) if value else {}
        for method, path in CALLS:
            answer = requests.request(method, f"{hub.service}/jupyter-agents/{path}", headers=headers, json={})
            assert answer.status_code == 403, (kind, method, path)
        assert socket_status(hub.service, **headers) == 403, kind
        for path in ("workspaces", "metrics"):
            assert requests.get(f"{hub.service}/{path}", headers=headers).status_code == 403, (kind, path)
        answer = requests.delete(f"{hub.service}/workspaces/ann?volume=1", headers=headers)
        assert answer.status_code == 403, kind


def test_a_missing_scope_is_named_to_the_user_and_in_the_log(hub: Hub) -> None:
    ann = hub.add_user("ann")
    client = Client(hub.service, ann.new_token(scopes=["access:servers!user=ann"]))
    error = refusal(client)
    assert error.reason == "missing_scope" and "access:services!service=jupyter-agents" in error.message
    assert "lacks the scope access:services!service=jupyter-agents" in hub.log.read_text()


def test_a_login_cookie_is_no_way_into_the_api(hub: Hub) -> None:
    session = hub.add_user("ann").login()
    session.get(f"{hub.service}/")  # logs in at the service, as far as that goes
    for method, path in CALLS:
        assert session.request(method, f"{hub.service}/jupyter-agents/{path}", json={}).status_code == 403
    cookies = "; ".join(f"{c.name}={c.value}" for c in session.cookies)
    assert socket_status(hub.service, Cookie=cookies) == 403
    assert socket_status(hub.service, Cookie=cookies, Origin="https://evil.example") == 403


def test_the_admin_page_is_for_those_who_have_the_scope(hub: Hub, deployment: str, docker_api: Any) -> None:
    ann, boss = hub.add_user("page-ann"), hub.add_user("boss")
    ann.direct.start_workspace()
    ann.direct.create_agent("kept")
    page = f"{hub.service}/"

    answer = ann.login().get(page)
    assert answer.status_code == 403 and "custom:jupyter-agents:admin" in answer.text

    session = boss.login()
    answer = session.get(page)
    assert answer.status_code == 200 and "page-ann" in answer.text
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    # By cookie, but without the page's XSRF token.
    assert session.post(page, data={"user": "page-ann", "action": "delete"}).status_code == 403
    assert session.delete(f"{hub.service}/workspaces/page-ann").status_code == 403
    assert container_of(deployment, "page-ann", docker_api)

    admin = token(boss.new_token())
    (found,) = [w for w in requests.get(f"{page}workspaces", headers=admin).json() if w["user"] == "page-ann"]
    assert found["agents"] == 1 and 0 < found["memory"]["used_bytes"] < found["limits"]["memory_bytes"]
    assert requests.delete(f"{page}workspaces/page-ann", headers=admin).status_code == 204
    assert container_of(deployment, "page-ann", docker_api) is None
    assert [agent["id"] for agent in ann.direct.agents()] == ["kept"]
    assert requests.delete(f"{page}workspaces/page-ann?volume=1", headers=admin).status_code == 204
    assert ann.direct.agents() == []


def test_the_same_on_the_command_line(hub: Hub, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ann, boss = hub.add_user("cli-ann"), hub.add_user("boss")
    ann.direct.create_agent("a")
    monkeypatch.setenv("JUPYTER_AGENTS_SERVICE_URL", f"{hub.service}/")
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", ann.token)
    assert cli.main(["list"]) == 1
    assert "custom:jupyter-agents:admin" in capsys.readouterr().err
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", boss.new_token())
    assert cli.main(["list"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cli-ann ")]
    assert "of 1024 MB  1 agents  0 runs" in line
    assert cli.main(["stop", "cli-ann"]) == 0
    assert cli.main(["list", "--json"]) == 0
    (stopped,) = [w for w in json.loads(capsys.readouterr().out) if w["user"] == "cli-ann"]
    assert stopped["state"] == "stopped" and stopped["in_hub"]
    assert [agent["id"] for agent in ann.direct.agents()] == ["a"]
    assert cli.main(["delete", "cli-ann"]) == 0
    assert cli.main(["list"]) == 0
    assert "cli-ann" not in capsys.readouterr().out
    assert ann.direct.agents() == []


def test_health_readiness_and_metrics(hub: Hub) -> None:
    ann, boss = hub.add_user("metrics-ann"), hub.add_user("boss")
    ann.direct.create_agent("a")
    assert ann.direct.start_run("a", "[[say hello]]").wait(60).status == "succeeded"
    assert requests.get(f"{hub.service}/health").json() == {"status": "ok"}
    wait_for(lambda: requests.get(f"{hub.service}/ready").json() == {"status": "ok"}, "ready")  # or was not 5 s ago
    text = requests.get(f"{hub.service}/metrics", headers=token(boss.new_token())).text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["jupyter_agents_workspaces"]) >= 1
    assert float(figures['jupyter_agents_runs_total{outcome="succeeded"}']) >= 1
    assert float(figures["jupyter_agents_memory_bytes"]) > 0
    assert "metrics-ann" not in text


def test_users_see_only_what_is_theirs(hub: Hub) -> None:
    ann, bob = hub.add_user("see-ann"), hub.add_user("see-bob")
    ann.direct.create_agent("secret")
    ann.direct.put("secret", b"of ann", "file")
    run = ann.direct.start_run("secret", "[[say hello]]").wait(60).id
    bob.direct.create_agent("mine")

    assert [agent["id"] for agent in bob.direct.agents()] == ["mine"]
    assert bob.direct.runs() == []
    for method, path, reason in [
        ("GET", "agents/secret", "unknown_agent"),
        ("GET", "agents/secret/env", "unknown_agent"),
        ("GET", "agents/secret/files/file", "unknown_agent"),
        ("GET", "agents/mine/files/..%2F..%2Fagent-secret%2Ffile", "bad_path"),
        ("GET", f"runs/{run}", "unknown_run"),
        ("GET", f"runs/{run}/events", "unknown_run"),
        ("DELETE", f"runs/{run}", "unknown_run"),
    ]:
        assert refusal(bob.direct, method, path).reason == reason, path
    socket = bob.direct._connect(5)
    socket.send(json.dumps({"subscribe": run, "since": 0}))
    while (message := json.loads(socket.recv()))["type"] != "error":
        assert "see-ann" not in json.dumps(message)
    assert message["reason"] == "unknown_run"
    socket.close()

    # To call oneself somebody else changes nothing.
    for change in [
        {"headers": {**token(bob.token), "X-Forwarded-User": "see-ann", "X-JupyterHub-User": "see-ann"}},
        {"params": {"user": "see-ann", "username": "see-ann", "token": ann.token}, "headers": token(bob.token)},
        {"json": {"user": "see-ann"}, "headers": token(bob.token)},
        {"cookies": {"jupyterhub-user-see-ann": "x", "service-jupyter-agents": ann.token}, "headers": token(bob.token)},
    ]:
        answer = requests.get(f"{hub.service}/jupyter-agents/workspace", **change)
        assert answer.json()["user"] == "see-bob"
    for path in ("see-ann/workspace", "user/see-ann/workspace", "../see-ann/workspace"):
        assert refusal(bob.direct, path=path).status == 404


def test_each_of_the_oddest_names_has_a_workspace_of_its_own(hub: Hub, deployment: str, docker_api: Any) -> None:
    names = ["Odd", "odd", "o.dd", "o-dd", "o dd", "odd@example.org", "Ünï 用户", "x" * 200, "x" * 199 + "y"]
    users = [hub.add_user(name) for name in names]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda user: user.direct.start_workspace(), users))
    assert [workspace["user"] for workspace in found] == names
    assert len({workspace["name"] for workspace in found}) == len(names)
    for name in names:
        container = container_of(deployment, name, docker_api)
        assert container and container["Config"]["Labels"]["jupyter-agents.user"] == name
    boss = token(hub.add_user("boss").new_token())
    for name in names:
        answer = requests.delete(f"{hub.service}/workspaces/{quote(name, safe='')}?volume=1", headers=boss)
        assert answer.status_code == 204
        assert container_of(deployment, name, docker_api) is None


def test_limits_of_groups_and_users_hold(hub: Hub, deployment: str, docker_api: Any) -> None:
    def limits(user: User) -> tuple[Any, ...]:
        limits = user.direct.start_workspace()["limits"]
        container = container_of(deployment, user.name, docker_api)
        assert container
        host = container["HostConfig"]
        assert host["Memory"] == host["MemorySwap"] == limits["memory_bytes"]
        assert host["NanoCpus"] == limits["cpu"] * 1e9
        return limits["memory_bytes"] // 2**20, limits["cpu"], limits["agents"], limits["runs"]

    carol, dave, erin = (hub.add_user(name) for name in ("carol", "dave", "erin"))
    assert limits(carol) == (600, 0.5, 1, 1)  # of both her groups the most generous
    assert limits(dave) == (600, 0.5, 10, 3)
    assert limits(erin) == (1024, 1, 2, 3)
    carol.direct.create_agent("one")
    assert refusal_of(carol.direct.create_agent, "two") == "too_many_agents"
    carol.direct.start_run("one", "[[sleep 20]]")
    assert refusal_of(carol.direct.start_run, "one", "[[say hello]]") in ("agent_busy", "too_many_runs")
    carol.direct.stop_workspace(volume=True)


def refusal_of(call: Any, *args: Any) -> str:
    with pytest.raises(AgentsError) as refused:
        call(*args)
    return refused.value.reason


def test_ten_users_at_once_get_ten_capped_containers(hub: Hub, deployment: str, docker_api: Any) -> None:
    users = [hub.add_user(f"ten-{n}") for n in range(10)]
    with ThreadPoolExecutor(30) as pool:  # each from three windows
        names = list(pool.map(lambda user: user.direct.start_workspace()["name"], users * 3))
    assert len(set(names)) == 10
    for user in users:
        container = container_of(deployment, user.name, docker_api)
        assert container and container["HostConfig"]["Memory"] == GB
        assert container["HostConfig"]["CapDrop"] == ["ALL"]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda user: user.direct.stop_workspace(volume=True), users))


def test_from_within_a_workspace_nothing_leads_out(hub: Hub, deployment: str, docker_api: Any) -> None:
    ann, bob = hub.add_user("within-ann"), hub.add_user("within-bob")
    bob.direct.start_workspace()
    other = container_of(deployment, "within-bob", docker_api)
    assert other
    address = other["NetworkSettings"]["Networks"]["jupyter-agents"]["IPAddress"]
    ann.direct.create_agent("spy")
    secrets = {"the service's token": service_secret(hub), "anything of the Hub": "JUPYTERHUB"}
    report = {
        "found": f"find(secrets, {WHERE})",
        "sockets": "sockets()",
        "engines": "engines()",
        "neighbour": f"[port for port in (22, 80, 2375, 8080) if reaches({address!r}, port)]",
    }
    ann.direct.put("spy", program(report, secrets, own="ANTHROPIC_API_KEY").encode(), "spy.py")
    run = ann.direct.start_run("spy", "[[run python3 spy.py]]").wait(90)
    assert '"found"' in run.text, (run.info, run.text)
    told = json.loads(run.text.split("```")[1])
    assert told["found"].pop("its own")
    assert told == {"found": {name: [] for name in secrets}, "sockets": [], "engines": [], "neighbour": []}


def test_a_killed_service_loses_nothing(hub: Hub, deployment: str, docker_api: Any) -> None:
    ann, bob = hub.add_user("killed-ann"), hub.add_user("killed-bob")
    bob.direct.create_agent("idle")
    ann.direct.create_agent("a")
    run = ann.direct.start_run("a", "[[slow 60 0.2]]")

    def ids() -> list[str]:
        found = [container_of(deployment, user.name, docker_api) for user in (ann, bob)]
        return [container["Id"] for container in found if container]

    before = ids()
    watching = ann.direct.watch(run.id)
    seen = [next(watching), next(watching)]
    service = hub.service_process()
    service.kill()
    seen += watching  # the client waits for the next service and goes on where it was
    assert hub.service_process().pid != service.pid
    assert run.wait(10).status == "succeeded" and run.text.split()[-1] == "word059"
    assert events_of(seen) == list(ann.direct.events(run.id))
    # Adopted, also where nobody came back.
    boss = token(hub.add_user("boss").new_token())
    adopted = {w["user"] for w in requests.get(f"{hub.service}/workspaces", headers=boss).json()}
    assert {"killed-ann", "killed-bob"} <= adopted
    assert len(before) == 2 and before == ids()


def test_activity_of_agents_is_reported(hub: Hub) -> None:
    ann = hub.add_user("active-ann")
    ann.direct.create_agent("a")
    before = ann.model()["last_activity"]
    run = ann.direct.start_run("a", "[[sleep 60]]")
    wait_for(lambda: ann.model()["last_activity"] > before, "activity seen")
    seen = ann.model()["last_activity"]
    wait_for(lambda: ann.model()["last_activity"] > seen, "activity seen again")
    run.cancel()


def test_who_is_deleted_from_the_hub_loses_the_container(hub: Hub, deployment: str, docker_api: Any) -> None:
    ann = hub.add_user("gone-ann")
    ann.direct.create_agent("a")
    ann.direct.start_run("a", "[[sleep 60]]")
    hub.wait_for_look()
    assert hub.api("DELETE", ann.path).status_code == 204
    wait_for(lambda: container_of(deployment, "gone-ann", docker_api) is None, "the container is gone")
    assert refusal(ann.direct).status == 403  # at once, though tokens are believed for 2 s here
    boss = token(hub.add_user("boss").new_token())
    (kept,) = [w for w in requests.get(f"{hub.service}/workspaces", headers=boss).json() if w["user"] == "gone-ann"]
    assert kept["state"] == "stopped" and not kept["in_hub"]  # the files stay, by default


def test_an_open_socket_of_a_deleted_user_starts_nothing(hub: Hub, deployment: str, docker_api: Any) -> None:
    ann = hub.add_user("open-ann")
    ann.direct.create_agent("a")
    run = ann.direct.start_run("a", "[[say hello]]").wait(60).id
    with closing(ann.direct._connect(5)) as socket:
        assert hub.api("DELETE", ann.path).status_code == 204
        wait_for(lambda: container_of(deployment, "open-ann", docker_api) is None, "the container is gone")
        socket.send(json.dumps({"subscribe": run, "since": 0}))
        while (message := json.loads(socket.recv()))["type"] not in ("error", "events"):
            pass
    assert message.get("reason") == "user_gone"
    assert container_of(deployment, "open-ann", docker_api) is None


def test_who_is_deleted_while_the_service_is_down_loses_the_container(
    hub: Hub, deployment: str, docker_api: Any
) -> None:
    ann = hub.add_user("missed-ann")
    ann.direct.create_agent("a")
    service = hub.service_process()
    service.suspend()
    assert hub.api("DELETE", ann.path).status_code == 204
    service.kill()
    wait_for(lambda: container_of(deployment, "missed-ann", docker_api) is None, "the container is gone")
