"""The oldest JupyterHub that we claim, and an engine that goes away and comes back."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from .running import ROOT, Hub, User, wait_for
from .test_service import (
    container_of,
    refusal,
    test_a_login_cookie_is_no_way_into_the_api,
    test_a_missing_scope_is_named_to_the_user_and_in_the_log,
    test_limits_of_groups_and_users_hold,
    test_the_admin_page_is_for_those_who_have_the_scope,
    test_wrong_credentials_are_refused_everywhere,
    token,
)
from .test_users import IN_A_KERNEL, test_the_browsers_cookie_needs_its_xsrf_token_and_its_origin

__all__ = [
    "test_a_login_cookie_is_no_way_into_the_api",
    "test_a_missing_scope_is_named_to_the_user_and_in_the_log",
    "test_limits_of_groups_and_users_hold",
    "test_the_admin_page_is_for_those_who_have_the_scope",
    "test_the_browsers_cookie_needs_its_xsrf_token_and_its_origin",
    "test_wrong_credentials_are_refused_everywhere",
]

OLDEST = ROOT / ".dev" / "hub-oldest" / "bin" / "python"


class Relay:
    """A socket that leads to the engine's, and can be cut, as when dockerd is restarted."""

    def __init__(self, path: str, target: str):
        self.path, self.target = path, target
        self.connect()

    def connect(self) -> None:
        Path(self.path).unlink(missing_ok=True)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen(100)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def cut(self) -> None:
        for one in [self._server, *self._open]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(self.target)
                self._open += [near, far]
                threading.Thread(target=self._copy, args=(near, far), daemon=True).start()
                threading.Thread(target=self._copy, args=(far, near), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def engine() -> Iterator[Relay]:
    directory = tempfile.mkdtemp()  # pytest's are too long for a socket
    relay = Relay(f"{directory}/docker.sock", "/var/run/docker.sock")
    yield relay
    relay.cut()
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def hub(start_hub: Callable[..., Hub], engine: Relay) -> Iterator[Hub]:
    assert OLDEST.exists(), "`make .dev/oldest` makes it"
    hub = start_hub(str(OLDEST), 'c.AgentsHub.deleted_users = "delete"', DOCKER_HOST=f"unix://{engine.path}")
    assert requests.get(f"{hub.url}/hub/api").json()["version"] == "5.0.0"
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def users(hub: Hub) -> list[User]:
    """One will do."""
    return hub.add_users("old-uma")


def test_a_kernel_has_its_users_workspace(users: list[User]) -> None:
    told = json.loads(users[0].execute(IN_A_KERNEL))
    assert told["user"] == "old-uma" and "I am with /workspace/agent-k" in told["text"]


def test_an_engine_that_goes_away_is_told_and_comes_back_by_itself(
    hub: Hub, engine: Relay, deployment: str, docker_api: Any
) -> None:
    ann = hub.add_user("outage-ann")
    ann.direct.create_agent("a")
    watching = ann.direct.watch()
    states = (message for message in watching if message and message["type"] == "state")
    assert next(states)["workspace"]["state"] == "ready"
    run = ann.direct.start_run("a", "[[sleep 100]]")
    engine.cut()
    container = container_of(deployment, "outage-ann", docker_api)
    assert container
    docker_api.remove_container(container["Id"], force=True)
    error = refusal(ann.direct, "GET", "agents")
    assert error.status == 503 and error.reason == "engine_unavailable", error
    assert any(state["workspace"]["state"] == "unavailable" for state in states)
    assert requests.get(f"{hub.service}/ready").status_code == 503
    engine.connect()
    assert any(state["workspace"]["state"] == "ready" for state in states)
    assert requests.get(f"{hub.service}/ready").status_code == 200
    assert run.status == "lost"
    assert [agent["id"] for agent in ann.direct.agents()] == ["a"]
    metrics = requests.get(f"{hub.service}/metrics", headers=token(hub.add_user("boss").new_token())).text
    assert 'jupyter_agents_engine_errors_total{reason="engine_unavailable"}' in metrics
    watching.close()


def test_the_volume_of_a_deleted_user_can_go_too(hub: Hub, deployment: str, docker_api: Any) -> None:
    ann = hub.add_user("gone-too-ann")
    ann.direct.create_agent("a")
    labels = [f"jupyter-agents.deployment={deployment}", "jupyter-agents.user=gone-too-ann"]
    assert docker_api.volumes(filters={"label": labels})["Volumes"]
    wait_for(lambda: "gone-too-ann" in hub.api("GET", "users").text, "the user is known")
    threading.Event().wait(1.5)  # the service looks once a second here
    assert hub.api("DELETE", ann.path).status_code == 204
    wait_for(lambda: not docker_api.volumes(filters={"label": labels})["Volumes"], "the volume is gone")
