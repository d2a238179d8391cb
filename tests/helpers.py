"""What tests of the core share: workspaces served without a server, runs to their end, looks into a container."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import docker
from traitlets.config import Config

from jupyter_agents.docker_engine import LABEL
from jupyter_agents.run import Run
from jupyter_agents.workspace import Workspace
from jupyter_agents.workspaces import Workspaces

IMAGE = "jupyter-agents:latest"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@asynccontextmanager
async def serving(
    user: str,
    audit: Callable[[dict[str, Any]], None] = lambda event: None,
    docker: dict[str, Any] | None = None,
    **traits: Any,
) -> AsyncIterator[Workspace]:
    """The user's workspace as a server would serve it, with these traits of `Workspaces` and of `DockerEngine`."""
    config = Config(Workspaces={"cpu_limit": 2, **traits}, DockerEngine=docker or {})
    workspaces = Workspaces(config=config, audit=audit)
    workspaces.start(user)
    try:
        yield workspaces.get(user)
    finally:
        await workspaces.stop()


async def eventually(true: Callable[[], Any], within: float = 15) -> Any:
    """The first true value that `true` returns."""
    deadline = time.monotonic() + within
    while not (value := true()):
        assert time.monotonic() < deadline, f"not within {within} s"
        await asyncio.sleep(0.05)
    return value


async def end_of(workspace: Workspace, run: Run, within: float = 60) -> Run:
    """The run, when it has ended without anybody asking."""
    await eventually(lambda: not workspace.run(run.id).active, within)
    return workspace.run(run.id)


async def finish(workspace: Workspace, agent: str, prompt: str, **request: Any) -> Run:
    """A run in an agent, which is created when need be, with its end."""
    if agent not in workspace.agents:
        await workspace.create_agent(agent)
    return await end_of(workspace, await workspace.start_run(agent, {"prompt": prompt, **request}))


def text(run: Run) -> str:
    assert run.result, run.error
    return str(run.result["text"])


async def log(workspace: Workspace, run: Run, since: int = 0, follow: bool = False) -> list[dict[str, Any]]:
    return [json.loads(line) async for batch in workspace.events(run.id, since, follow) for line in batch]


async def seen(workspace: Workspace, run: Run, what: str, within: float = 30) -> None:
    """Wait until a run's log holds some text, such as a tool's."""

    async def read() -> None:
        held = ""
        async for batch in workspace.events(run.id, 0, True):
            held += b"\n".join(batch).decode()
            if what in held:
                return
        raise AssertionError(f"{what!r} did not come: {held[-2000:]}")

    await asyncio.wait_for(read(), within)


def containers(api: docker.APIClient, user: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.containers(all=True, filters={"label": f"{LABEL}={user}"})
    return found


def volumes(api: docker.APIClient, user: str) -> list[str]:
    return [v["Name"] for v in api.volumes(filters={"label": f"{LABEL}={user}"})["Volumes"] or []]


def processes(api: docker.APIClient, container: str, uid: int) -> list[str]:
    """Command lines of a uid's processes, seen from the host; zombies don't count."""
    listed = api.top(container, "-eo pid,uid,stat,args")["Processes"]
    return [args for _, owner, state, args in listed if owner == str(uid) and not state.startswith("Z")]


async def nothing_left(api: docker.APIClient, workspace: Workspace, agent: str) -> None:
    """The agent has no process; a reader of its log may need a moment to close."""
    assert workspace.container
    container, uid = workspace.container.id, workspace.agents[agent].uid
    await eventually(lambda: not processes(api, container, uid), 5)


def output(api: docker.APIClient, container: str, *argv: str, user: str = "0") -> str:
    made = api.exec_create(container, list(argv), user=user)["Id"]
    told: bytes = api.exec_start(made)
    return told.decode()


@contextmanager
def another_name(api: docker.APIClient, user: str) -> Iterator[str]:
    """The workspace image under another name, as long as a test of this user takes."""
    api.tag(IMAGE, "jupyter-agents-test", user)
    yield f"jupyter-agents-test:{user}"
    api.remove_image(f"jupyter-agents-test:{user}", force=True)


def derived_image(api: docker.APIClient, tag: str, files: dict[str, bytes], base: str = IMAGE) -> str:
    """An image with further executable files, made without a build; its id."""
    made = api.create_container(base)["Id"]
    try:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for path, data in files.items():
                info = tarfile.TarInfo(path.lstrip("/"))
                info.mode, info.size = 0o755, len(data)
                tar.addfile(info, io.BytesIO(data))
        api.put_archive(made, "/", out.getvalue())
        name, _, version = tag.partition(":")
        return str(api.commit(made, name, version)["Id"])
    finally:
        api.remove_container(made, force=True)
