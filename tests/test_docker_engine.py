"""What is said when the Docker engine or the image is not as it should be."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest
from conftest import Api
from helpers import serving
from traitlets.config import Config

from jupyter_agents.docker_engine import DockerEngine
from jupyter_agents.errors import Stuck, Unavailable

# docker-py leaves a socket open that could not connect.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Such sockets don't outlive the test that ignores them."""
    yield
    gc.collect()


CALLS = [
    ("POST", "workspace", None),
    ("GET", "agents", None),
    ("POST", "agents", {"id": "a1"}),
    ("GET", "agents/a1/files/", None),
    ("POST", "agents/a1/runs", {"prompt": "x"}),
    ("GET", "runs", None),
]


async def refused(api: Api, reason: str, command: str) -> None:
    """Every call says so in one sentence, and the workspace's state does."""
    for verb, path, body in CALLS:
        status, error = await api(verb, path, body)
        told = (status, error.get("reason"), error.get("command"))
        assert told == (503, reason, command), (verb, path, error)
        assert "Traceback" not in error["message"]
        assert len(error["message"]) < 300
    status, workspace = await api("GET", "workspace")
    assert (status, workspace["state"], workspace["problem"]["reason"]) == (200, "unavailable", reason)


class TestDockerThatDoesNotRun:
    @pytest.fixture(params=["unix:///nowhere/docker.sock", "tcp://127.0.0.1:9"])
    def user(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setenv("DOCKER_HOST", request.param)
        return "nobody"

    async def test_is_said(self, api: Api, jp_ws_fetch: Any) -> None:
        await refused(api, "engine_unavailable", "sudo systemctl start docker")
        connection = await jp_ws_fetch("jupyter-agents", "events")
        state = json.loads(await connection.read_message())
        assert state["workspace"]["problem"]["reason"] == "engine_unavailable"
        connection.close()


class TestImageThatIsMissing:
    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any]) -> dict[str, Any]:
        return {**jp_server_config, "DockerEngine": {"image": "jupyter-agents-none:1"}}

    async def test_is_said(self, api: Api) -> None:
        await refused(api, "image_missing", "jupyter agents build")


@contextmanager
def not_root() -> Iterator[None]:
    """Root may use any socket, so it is somebody else meanwhile."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


async def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "docker.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    engine = DockerEngine()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        path.chmod(0)
        with not_root(), pytest.raises(Unavailable) as denied:
            await engine.check()
    engine.close()
    assert (denied.value.reason, denied.value.status) == ("engine_forbidden", 503)
    assert denied.value.command == "sudo usermod -aG docker $USER"


async def test_two_deployments_do_not_see_each_other(user: str, docker_api: docker.APIClient) -> None:
    mine = DockerEngine()
    other = DockerEngine(config=Config(DockerEngine={"deployment": f"other-{user}"}))
    async with serving(user) as workspace:
        container = await workspace.connect()
        assert [c.id for c in await mine.containers(user)] == [container.id]
        assert await other.containers(user) == []
        await other.remove(user, volume=True)
        assert [c.id for c in await mine.containers(user)] == [container.id]
        # A label matches whole, so a user whose name begins alike is another one.
        assert await mine.containers(user[:-1]) == []
    mine.close()
    other.close()


async def test_hardening(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as workspace:
        container = await workspace.connect()
        told = docker_api.inspect_container(container.id)
    host = told["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"], host["PidsLimit"]) == (2**30, 2**30, 2 * 10**9, 512)
    assert (host["CapDrop"], host["CapAdd"], host["Privileged"], host["Init"]) == (["ALL"], None, False, True)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert not host["PortBindings"]
    assert not host["Binds"]
    assert [(m["Type"], m["Destination"]) for m in told["Mounts"]] == [("volume", "/workspace")]
    assert told["Config"]["User"] == "65534:65534"


async def test_who_does_not_read_holds_up_nobody_else(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jupyter_agents.docker_engine.WRITE_SECONDS", 4)
    async with serving(user) as workspace:
        container = await workspace.connect()
        engine = workspace.engine
        processes = [await engine.exec(container, ["sleep", "30"], 65534) for _ in range(80)]
        writing = [asyncio.ensure_future(process.write(bytes(2**22))) for process in processes]
        await asyncio.sleep(0.5)
        await asyncio.wait_for(engine.check(), 2)
        told = await asyncio.gather(*writing, return_exceptions=True)
        assert {type(error) for error in told} == {Stuck}
        for process in processes:
            process.close()
