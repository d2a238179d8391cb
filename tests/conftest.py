"""Real Docker, the real CLI, a real Jupyter server; only the model is scripted (demo/scripted_model.py)."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import requests
from docker.errors import NotFound
from jupyter_server.serverapp import ServerApp

from jupyter_agents.docker_engine import LABEL

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
pytest_plugins = ["pytest_jupyter.jupyter_server"]

# Whoever is started in the background, as by some CI, ignores interrupts, and so would the kernels that we interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

Api = Callable[..., Awaitable[tuple[int, Any]]]


@pytest.fixture(scope="session")
def docker_api() -> Iterator[docker.APIClient]:
    """Docker must be there: without it the suite fails rather than skips."""
    client = docker.from_env()
    yield client.api
    client.close()


@pytest.fixture(scope="session")
def model(docker_api: docker.APIClient) -> Iterator[str]:
    """The scripted model's address as the workspaces see it; the environment of this process leads there."""
    from demo import model_addresses  # type: ignore[import-not-found]

    hosts, name = model_addresses()
    command = [sys.executable, str(ROOT / "demo" / "scripted_model.py"), "--host", *hosts]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        url = f"http://{name}:{process.stdout.readline().strip().rpartition(':')[2]}"
        settings = {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": "scripted",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
        os.environ.update(settings)
        yield url
        for key in settings:
            del os.environ[key]
        process.terminate()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # The front end is built, so that the build hook has nothing to do.
    environment = {**os.environ, "HATCH_JUPYTER_BUILDER_SKIP_NPM": "1"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(ROOT)]
    subprocess.run(command, check=True, env=environment)
    return next(out.glob("*.whl"))


@pytest.fixture
def user(docker_api: docker.APIClient) -> Iterator[str]:
    """A user of this test's own, of whom nothing is left."""
    name = f"test-{secrets.token_hex(4)}"
    yield name
    clean_up(docker_api, name)


def clean_up(docker_api: docker.APIClient, user: str) -> None:
    label = {"label": f"{LABEL}={user}"}
    for container in docker_api.containers(all=True, filters=label):
        docker_api.remove_container(container["Id"], force=True)
    for volume in docker_api.volumes(filters=label)["Volumes"] or []:
        try:
            docker_api.remove_volume(volume["Name"])
        except NotFound:
            pass


@pytest.fixture
def jp_server_config(user: str, jp_asyncio_loop: asyncio.AbstractEventLoop) -> Iterator[dict[str, Any]]:
    yield {
        "ServerApp": {"jpserver_extensions": {"jupyter_agents": True}},
        "JupyterAgents": {"user": user},
    }
    # The plugin would do so after nothing of the user may be left.
    if ServerApp.initialized():
        jp_asyncio_loop.run_until_complete(ServerApp.instance().extension_manager.stop_all_extensions())


@pytest.fixture
def api(jp_fetch: Callable[..., Awaitable[Any]], model: str) -> Api:
    """`status, body = await api("POST", "agents", {"id": "x"})` on a server in this process; `data` is sent raw."""

    async def call(method: str, path: str, body: Any = None, data: Any = None, **kwargs: Any) -> tuple[int, Any]:
        kwargs["body"] = data
        if body is not None:
            kwargs["body"] = json.dumps(body)
            kwargs.setdefault("headers", {})["Content-Type"] = "application/json"
        response = await jp_fetch(
            "jupyter-agents",
            *path.split("/"),
            method=method,
            allow_nonstandard_methods=True,
            raise_error=False,
            request_timeout=120,
            **kwargs,
        )
        kind = response.headers.get("Content-Type", "")
        return response.code, json.loads(response.body) if "json" in kind and "nd" not in kind else response.body

    return call


class Server:
    """A Jupyter server in a process of its own."""

    def __init__(self, user: str, folder: Path):
        config = {
            "ServerApp": {
                "port": 0,
                "allow_root": True,
                "root_dir": str(folder),
                "jpserver_extensions": {"jupyter_agents": True},
            },
            "IdentityProvider": {"token": secrets.token_hex()},
            "JupyterAgents": {"user": user},
        }
        (folder / "config.json").write_text(json.dumps(config))
        places = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
        command = [sys.executable, "-m", "jupyter_server", f"--config={folder / 'config.json'}", "--no-browser"]
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen(command, env={**os.environ, **places}, stdout=log, stderr=log)
        self.pid = self._process.pid
        self.token = config["IdentityProvider"]["token"]
        deadline = time.monotonic() + 60
        while not (found := list((folder / "RUNTIME").glob("jpserver-*.json"))):
            assert self._process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "the server doesn't start"
            time.sleep(0.1)
        self.base_url = json.loads(found[0].read_text())["url"] + "jupyter-agents/"

    def url(self, path: str) -> str:
        return self.base_url + path

    def session(self) -> requests.Session:
        session = requests.Session()
        session.headers["Authorization"] = f"token {self.token}"
        return session

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture(scope="module")
def server(docker_api: docker.APIClient, model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for tests that need a process of its own, or its port from another thread."""
    name = f"test-{secrets.token_hex(4)}"
    running = Server(name, tmp_path_factory.mktemp("server"))
    yield running
    running.stop()
    clean_up(docker_api, name)
