"""A workspace's container: its caps, how it is made, found again and kept, and what is told of its memory."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import docker
import pytest
import requests
import websocket
from conftest import clean_up
from docker.errors import ImageNotFound
from helpers import (
    IMAGE,
    containers,
    derived_image,
    end_of,
    eventually,
    finish,
    log,
    output,
    processes,
    seen,
    serving,
    text,
    volumes,
)
from traitlets.config import Config

from jupyter_agents.docker_engine import DEPLOYMENT_LABEL, LABEL, DockerEngine
from jupyter_agents.errors import Conflict, DiskFull, Protected, Unavailable
from jupyter_agents.workspace import Workspace
from jupyter_agents.workspaces import Workspaces

pytestmark = pytest.mark.usefixtures("model")
MB = 2**20


# --- caps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("traits", "memory", "cpu", "pids"),
    [
        ({"cpu_limit": 1.0}, 2**30, 1.0, 512),
        ({"memory_limit": 300 * MB, "cpu_limit": 0.5, "pids_limit": 99}, 300 * MB, 0.5, 99),
    ],
    ids=["default", "set"],
)
async def test_caps(
    user: str, docker_api: docker.APIClient, traits: dict[str, Any], memory: int, cpu: float, pids: int
) -> None:
    async with serving(user, **traits) as workspace:
        await workspace.create_agent("a")
        assert workspace.container
        about = docker_api.inspect_container(workspace.container.id)
        uid = str(workspace.agents["a"].uid)
        inside = output(
            docker_api, workspace.container.id, "sh", "-c",
            "id; grep -E '^(Cap|NoNewPrivs)' /proc/self/status; cat /proc/1/comm; cd /sys/fs/cgroup;"
            "cat memory/memory.limit_in_bytes memory/memory.memsw.limit_in_bytes cpu/cpu.cfs_quota_us pids/pids.max"
            " || cat memory.max memory.swap.max cpu.max pids.max; : 2>&1",
            user=f"{uid}:{uid}",
        )  # fmt: skip
        shown = workspace.to_dict()["limits"]
    host = about["HostConfig"]
    assert host["Memory"] == host["MemorySwap"] == memory
    assert host["NanoCpus"] == cpu * 10**9
    assert host["PidsLimit"] == pids
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Init"] is True
    assert not host["Binds"]
    assert not host["PortBindings"]
    assert not host["Devices"]
    assert about["Config"]["User"] not in ("", "0", "root", "0:0")
    assert [(mount["Type"], mount["Destination"]) for mount in about["Mounts"]] == [("volume", "/workspace")]
    assert not any(host[f"{kind}Mode"] == "host" for kind in ("Pid", "Ipc", "Network", "UTS", "Userns"))
    assert f"uid={uid} gid={uid} groups={uid}" in inside
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert f"{kind}:\t{'0' * 16}\n" in inside
    assert "NoNewPrivs:\t1" in inside
    figures = inside.split()
    assert str(memory) in figures
    assert str(pids) in figures
    assert str(int(cpu * 100_000)) in figures
    assert (shown["memory_bytes"], shown["cpu"]) == (memory, cpu)


async def test_root_in_a_workspace_is_nobody(user: str, docker_api: docker.APIClient) -> None:
    """The only thing done as uid 0, looking at processes and emptied directories, could not reach an agent's files."""
    async with serving(user) as workspace:
        await workspace.create_agent("a")
        assert workspace.container
        attempt = "cat /workspace/agent-a/.env 2>&1; ls /workspace/agent-a 2>&1"
        told = output(docker_api, workspace.container.id, "sh", "-c", attempt)
    assert told.count("Permission denied") == 2


async def test_workspaces_cannot_reach_each_other(user: str, docker_api: docker.APIClient) -> None:
    other = f"{user}-other"
    serve = "import http.server as h; h.HTTPServer(('', 8000), h.SimpleHTTPRequestHandler).serve_forever()"
    reach = "import socket; socket.create_connection(('{}', {}), 2); print('reached')"
    try:
        async with serving(user) as one, serving(other) as two:
            await asyncio.gather(one.connect(), two.connect())
            assert one.container
            assert two.container
            started = docker_api.exec_create(two.container.id, ["python3", "-c", serve], user="1000")["Id"]
            docker_api.exec_start(started, detach=True)
            networks = docker_api.inspect_container(two.container.id)["NetworkSettings"]["Networks"]
            address = next(iter(networks.values()))["IPAddress"]

            def tried(container: str, host: str, port: int) -> str:
                return output(docker_api, container, "python3", "-c", reach.format(host, port), user="1000")

            await eventually(lambda: "reached" in tried(two.container.id, address, 8000))
            assert "timed out" in tried(one.container.id, address, 8000)
            host, _, port = os.environ["ANTHROPIC_BASE_URL"].removeprefix("http://").partition(":")
            assert "reached" in tried(one.container.id, host, int(port))  # else nothing is proved
    finally:
        for name in volumes(docker_api, other):
            docker_api.remove_volume(name)


# --- made, adopted, made anew ---------------------------------------------------------------------------------------


async def test_two_servers_at_the_same_moment(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as one, serving(user) as two:
        made = await asyncio.gather(one.connect(), two.connect(), one.connect(), two.connect())
        assert len({container.id for container in made}) == 1
        assert len(containers(docker_api, user)) == 1
        assert len(volumes(docker_api, user)) == 1
        await one.create_agent("a")
        await two.refresh()
        assert [agent["id"] for agent in two.list_agents()] == ["a"]
        run = await one.start_run("a", {"prompt": "[[slow 20 0.1]] [[sleep 60]]"})
        await two.refresh()
        assert two.run(run.id).active
        await seen(two, run, "word019")
        assert (await two.cancel(run.id)).state == "cancelled"
        assert (await end_of(one, run, 5)).state == "cancelled"
        assert await log(one, run) == await log(two, run)
        await one.remove_agent("a")
        await two.refresh()
        assert two.list_agents() == []


async def test_engine_made_anew(user: str, docker_api: docker.APIClient) -> None:
    """Whatever happened to the container, the next call finds another one on the same volume."""
    async with serving(user) as workspace:
        await finish(workspace, "a", "[[write kept.txt kept]]")
        volume = volumes(docker_api, user)

        async def read() -> str:
            entries = await listing(workspace, "a")
            assert len(containers(docker_api, user)) == 1
            assert volumes(docker_api, user) == volume
            return " ".join(entries)

        for misfortune in (
            lambda c: docker_api.kill(c),
            lambda c: docker_api.stop(c, timeout=0),
            lambda c: docker_api.pause(c),
            lambda c: docker_api.remove_container(c, force=True),
        ):
            assert workspace.container
            before = workspace.container.id
            misfortune(before)
            assert "kept.txt" in await read()
            assert workspace.container.id != before

        before = workspace.container.id
        docker_api.kill(before)  # while no server looks
        async with serving(user) as second:
            assert "kept.txt" in await listing(second, "a")
            assert second.container
            assert second.container.id != before


async def listing(workspace: Workspace, agent: str) -> list[str]:
    async with workspace.open_file(agent, "") as entries:
        assert isinstance(entries, list)
        return [entry["name"] for entry in entries]


async def test_made_but_never_started(user: str, docker_api: docker.APIClient) -> None:
    """A server died between the two steps; it may also be one that is about to start it."""
    async with serving(user) as workspace:
        await workspace.connect()
        assert workspace.container
        name = workspace.container.name
        labels = docker_api.inspect_container(name)["Config"]["Labels"]
        await workspace.stop()
        left = docker_api.create_container(IMAGE, name=name, labels=labels)["Id"]
        container = await workspace.connect()
        assert container.id != left
        assert len(containers(docker_api, user)) == 1


@pytest.fixture
def tag(user: str, docker_api: docker.APIClient) -> Iterator[str]:
    """The name of an image that a test makes."""
    tag = f"jupyter-agents-test:{user}"
    yield tag
    for container in containers(docker_api, user):
        docker_api.remove_container(container["Id"], force=True)
    with suppress(ImageNotFound):  # a test may have removed it, or made none
        docker_api.remove_image(tag, force=True)


def changed_image(api: docker.APIClient, tag: str, script: str) -> None:
    """Tag what a shell script, run as root, makes of the workspace image."""
    made = api.create_container(IMAGE, ["sh", "-c", script], user="0", entrypoint=[])["Id"]
    api.start(made)
    api.wait(made)
    name, _, version = tag.partition(":")
    api.commit(made, name, version, changes=["LABEL jupyter-agents.agentctl=", "WORKDIR /"])
    api.remove_container(made)


async def test_new_image(user: str, tag: str, docker_api: docker.APIClient) -> None:
    changed_image(docker_api, tag, "echo 1 > /version")
    async with serving(user, docker={"image": tag}) as workspace:
        await workspace.create_agent("a")
        run = await workspace.start_run("a", {"prompt": "[[write kept.txt kept]] [[slow 20 0.5]]"})
        assert workspace.container
        first = workspace.container.id
        await seen(workspace, run, "kept.txt")
        changed_image(docker_api, tag, "echo 2 > /version")
        async with serving(user, docker={"image": tag}) as second:
            assert (await second.connect()).id == first  # for the run's sake
            assert second.run(run.id).active
        await workspace.cancel(run.id)
        async with serving(user, docker={"image": tag}) as second:
            container = await second.connect()
            assert container.id != first
            assert output(docker_api, container.id, "cat", "/version") == "2\n"
            assert "kept.txt" in await listing(second, "a")


# --- the image that a user chooses ----------------------------------------------------------------------------------


async def test_no_other_image_may_be_chosen_unless_it_is_allowed(user: str, tag: str) -> None:
    async with serving(user) as workspace:
        assert workspace.to_dict()["images"] == [IMAGE]
        before = await workspace.connect()
        for image in (tag, "", f"{IMAGE} ", "debian:bookworm-slim"):
            with pytest.raises(Protected, match=f"choose one of {IMAGE}") as refused:
                await workspace.choose_image(image)
            assert (refused.value.status, refused.value.reason) == (403, "image_not_allowed")
        await workspace.choose_image(IMAGE)
        assert (await workspace.connect()).id == before.id


async def test_a_chosen_image_stays_with_its_files(user: str, tag: str, docker_api: docker.APIClient) -> None:
    made = derived_image(docker_api, tag, {"/usr/local/bin/extra": b"#!/bin/sh\necho an extra program"})
    allowed = {"allowed_images": [tag]}

    def image() -> str:
        (only,) = containers(docker_api, user)
        return str(only["ImageID"])

    async with serving(user, docker=allowed) as workspace:
        assert workspace.to_dict()["images"] == [IMAGE, tag]
        run = await finish(workspace, "a", "[[write kept.txt kept]] [[run extra]]")
        assert "an extra program" not in text(run)
        assert workspace.to_dict()["image"] == IMAGE
        await workspace.choose_image(tag)
        assert (workspace.to_dict()["image"], image()) == (tag, made)
        assert "kept.txt" in await listing(workspace, "a")
        attempt = "[[run extra; cd /workspace; echo x > .image; rm -f .image; mv .image y; cat .image; ls]]"
        run = await finish(workspace, "a", attempt)
        assert run.continued
        assert "an extra program" in text(run)
        assert text(run).count("Permission denied") == 5
        assert workspace.container
        docker_api.remove_container(workspace.container.id, force=True)
        assert "kept.txt" in await listing(workspace, "a")
        assert image() == made
    assert containers(docker_api, user) == []
    async with serving(user, docker=allowed) as second:
        assert ((await second.connect()).image, image()) == (tag, made)
        async with serving(user, docker={"allowed_images": ["some-other:1"]}) as third:
            assert (await third.connect()).image == IMAGE  # no longer allowed
            assert "kept.txt" in await listing(third, "a")
    async with serving(user, docker=allowed) as fourth:
        assert (await fourth.connect()).image == tag
        await fourth.choose_image(IMAGE)
        assert fourth.to_dict()["image"] == IMAGE
        await fourth.choose_image(tag)
    async with serving(user) as closed:
        assert (await closed.connect()).image == IMAGE


async def test_no_image_is_chosen_while_a_run_goes_on(user: str, tag: str, docker_api: docker.APIClient) -> None:
    docker_api.tag(IMAGE, *tag.split(":"))
    allowed = {"allowed_images": [tag]}
    async with serving(user, docker=allowed) as workspace, serving(user, docker=allowed) as other:
        await workspace.create_agent("a")
        run = await workspace.start_run("a", {"prompt": "[[slow 100 0.2]]"})
        await seen(workspace, run, "word001")
        assert workspace.container
        container = workspace.container.id
        for each in (workspace, other):  # which has never heard of the run
            with pytest.raises(Conflict, match="stop their runs or wait") as refused:
                await each.choose_image(tag)
            assert refused.value.reason == "runs_active"
        assert (await other.connect()).id == container
        assert other.run(run.id).active
        await workspace.cancel(run.id)
        await end_of(other, other.run(run.id), 5)
        await other.choose_image(tag)
        await workspace.refresh()
        assert [each.to_dict()["image"] for each in (workspace, other)] == [tag, tag]


async def test_a_chosen_image_that_is_missing(user: str, tag: str, docker_api: docker.APIClient) -> None:
    """Whoever chose it can go back; whoever chooses it keeps what runs."""
    docker_api.tag(IMAGE, *tag.split(":"))
    async with serving(user, docker={"allowed_images": [tag]}) as workspace:
        await workspace.choose_image(tag)  # the first thing that this user does
        assert workspace.to_dict()["image"] == tag
        await workspace.create_agent("a")
        await workspace.stop()
        docker_api.remove_image(tag)
        for attempt in (workspace.connect(), workspace.choose_image(tag)):
            with pytest.raises(Unavailable, match=f"image {tag} is missing: choose another one.*{IMAGE}") as missing:
                await attempt
            assert missing.value.reason == "image_missing" and tag in missing.value.message
            assert containers(docker_api, user) == []
        assert workspace.to_dict()["problem"]["reason"] == "image_missing"
        await workspace.choose_image(IMAGE)
        assert workspace.to_dict()["problem"] is None
        assert [agent["id"] for agent in workspace.list_agents()] == ["a"]
        before = workspace.container
        with pytest.raises(Unavailable):
            await workspace.choose_image(tag)
        assert workspace.container == before
        assert (await workspace.connect()) == before


async def test_what_is_no_choice_counts_as_none(user: str, tag: str, docker_api: docker.APIClient) -> None:
    docker_api.tag(IMAGE, *tag.split(":"))
    async with serving(user, docker={"allowed_images": [tag]}) as workspace:
        container = await workspace.connect()

        async def outdated(kind: bytes, data: bytes = b"", target: str = "") -> bool:
            entry = tarfile.TarInfo("workspace/.image")
            entry.type, entry.size, entry.linkname = kind, len(data), target
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w") as tar:
                tar.addfile(entry, io.BytesIO(data))
            output(docker_api, container.id, "rm", "-rf", "/workspace/.image")
            docker_api.put_archive(container.id, "/", out.getvalue())
            return (await workspace.engine.ensure(user, workspace.limits)).outdated

        for data in (b"", b"debian:bookworm-slim", b"\xff", tag.encode() + b"\n", tag.encode() + b"\0" * 100_000):
            assert not await outdated(tarfile.REGTYPE, data)
        assert not await outdated(tarfile.DIRTYPE)
        assert not await outdated(tarfile.SYMTYPE, target="/etc/passwd")
        assert not await outdated(tarfile.FIFOTYPE)
        assert await outdated(tarfile.REGTYPE, tag.encode())


async def test_image_of_ones_own(user: str, tag: str, docker_api: docker.APIClient) -> None:
    """No git, Python, ripgrep, user or supervisor in it: a shell, coreutils and claude will do."""
    script = "cd /usr/bin; rm -f git python3* rg; rm -rf /opt/jupyter-agents /workspace; userdel -r claude"
    changed_image(docker_api, tag, script)
    async with serving(user, docker={"image": tag}) as workspace:
        run = await finish(workspace, "a", "[[write x.txt x]] [[run command -v git python3 rg; echo worked]]")
        assert "worked" in text(run)
        assert "/usr/bin" not in text(run)
        assert "x.txt" in await listing(workspace, "a")
        with pytest.raises(Conflict, match="has no git"):
            await workspace.diff("a")


async def test_image_without_claude(user: str, tag: str, docker_api: docker.APIClient) -> None:
    changed_image(docker_api, tag, "rm /usr/local/bin/claude")
    async with serving(user, docker={"image": tag}) as workspace:
        await workspace.create_agent("a")
        with pytest.raises(Unavailable, match="no `claude` command") as e:
            await workspace.start_run("a", {"prompt": "hi"})
        assert e.value.reason == "image_broken"
        assert workspace.runs_of("a") == []


# --- how long it is kept --------------------------------------------------------------------------------------------


async def test_closing(user: str, docker_api: docker.APIClient) -> None:
    def there() -> list[str]:
        return [container["Id"] for container in containers(docker_api, user)]

    async with serving(user, cleanup_grace=2.5) as workspace:
        with workspace.listening(lambda message: None):
            container = await eventually(lambda: workspace.container)
            await asyncio.sleep(3.5)
            assert there() == [container.id]
        await asyncio.sleep(0.7)  # a page reload
        assert there() == [container.id]
        with workspace.listening(lambda message: None):
            await asyncio.sleep(2.5)
            assert there() == [container.id]
            await workspace.create_agent("a")
        run = await workspace.start_run("a", {"prompt": "[[slow 10 0.4]]"})
        while workspace.run(run.id).active:
            assert there() == [container.id]
            await asyncio.sleep(0.2)
        assert workspace.run(run.id).ended - run.started > 3
        assert workspace.run(run.id).state == "succeeded"
        await eventually(lambda: not there())
        assert len(volumes(docker_api, user)) == 1
        await eventually(lambda: workspace.to_dict()["state"] == "stopped")
        await workspace.refresh()
        assert [agent["id"] for agent in workspace.list_agents()] == ["a"]
        assert workspace.run(run.id).state == "succeeded"


async def test_server_stops(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a")
        idle = workspace.container
    assert containers(docker_api, user) == []
    async with serving(user) as workspace:
        await workspace.connect()
        run = await workspace.start_run("a", {"prompt": "[[slow 12 0.5]]"})
        assert workspace.container
        container = workspace.container.id
    assert idle
    assert idle.id != container
    assert [c["Id"] for c in containers(docker_api, user)] == [container]
    async with serving(user, orphan_age=0) as workspace:
        await asyncio.sleep(1)  # it is not reaped either
        assert (await workspace.connect()).id == container
        assert workspace.run(run.id).active
        events, ended = await asyncio.gather(log(workspace, run, follow=True), end_of(workspace, run))
        assert ended.state == "succeeded"
        assert events[0]["type"] == "system"
        assert events[-1]["type"] == "run_end"
        assert text(ended) == "".join(f"word{n:03d} " for n in range(12))


async def test_orphans_are_reaped(user: str, docker_api: docker.APIClient) -> None:
    crashed = Workspaces()
    await crashed.get(user).connect()
    crashed.engine.close()
    async with serving(user):
        await asyncio.sleep(0.5)
        assert len(containers(docker_api, user)) == 1  # not old enough
        for c in containers(docker_api, user):
            docker_api.pause(c["Id"])
    async with serving(user, orphan_age=0):
        await eventually(lambda: not containers(docker_api, user))
    assert len(volumes(docker_api, user)) == 1


async def test_stopped_by_the_user(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a")
        run = await workspace.start_run("a", {"prompt": "[[sleep 60]]"})
        await workspace.stop()
        assert containers(docker_api, user) == []
        assert workspace.run(run.id).state == "cancelled"
        await workspace.refresh()
        assert workspace.run(run.id).state == "cancelled"
        assert [agent["id"] for agent in workspace.list_agents()] == ["a"]
        await workspace.stop(volume=True)
        assert containers(docker_api, user) == []
        assert volumes(docker_api, user) == []
        await workspace.refresh()
        assert workspace.list_agents() == []


class Server:
    """A Jupyter server in a process of its own, which can be killed."""

    def __init__(self, directory: Path, user: str):
        config = {"JupyterAgents": {"user": user}, "ServerApp": {"jpserver_extensions": {"jupyter_agents": True}}}
        (directory / "jupyter_server_config.json").write_text(json.dumps(config))
        environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(directory), "JUPYTER_RUNTIME_DIR": str(directory)}
        options = [
            "--ServerApp.port=0",
            "--ServerApp.allow_root=True",
            "--IdentityProvider.token=t0ken",
            "--no-browser",
        ]
        command = [sys.executable, "-m", "jupyter_server", *options, f"--ServerApp.root_dir={directory}"]
        for old in directory.glob("jpserver-*.json"):
            old.unlink()
        self.log = (directory / "log").open("ab")
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 30
        while not (found := list(directory.glob("jpserver-*.json"))):
            assert self.process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        while True:
            try:
                self.url = json.loads(found[0].read_text())["url"] + "jupyter-agents/"
                self.call("GET", "workspace")
                return
            except (ValueError, requests.ConnectionError):
                assert time.monotonic() < deadline
                time.sleep(0.1)

    def call(self, method: str, path: str, body: Any = None) -> requests.Response:
        headers = {"Authorization": "token t0ken"}
        return requests.request(method, self.url + path, json=body, headers=headers, timeout=30)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(20)
        self.log.close()


async def test_server_killed_in_the_middle_of_a_run(user: str, docker_api: docker.APIClient, tmp_path: Path) -> None:
    server = Server(tmp_path, user)
    try:
        assert server.call("POST", "agents", {"id": "a"}).status_code == 201
        run = server.call("POST", "agents/a/runs", {"prompt": "[[slow 40 0.3]]"}).json()
        socket = websocket.create_connection(
            server.url.replace("http", "ws") + "events", header=["Authorization: token t0ken"]
        )
        assert json.loads(socket.recv())["type"] == "state"
        container = containers(docker_api, user)[0]["Id"]
        await eventually(lambda: any("watch" in line for line in processes(docker_api, container, 0)))
    finally:
        server.end(signal.SIGKILL)
    socket.shutdown()
    await eventually(lambda: not processes(docker_api, container, 0))  # nobody watches any more
    server = Server(tmp_path, user)
    try:
        listed = server.call("GET", "runs").json()
        assert [(r["id"], r["state"]) for r in listed] == [(run["id"], "running")]
        lines = server.call("GET", f"runs/{run['id']}/events?follow=1").text.splitlines()
        events = [json.loads(line) for line in lines]
        assert events[0]["type"] == "system"
        assert events[-1]["type"] == "run_end"
        ended = server.call("GET", f"runs/{run['id']}").json()
        assert ended["state"] == "succeeded"
        assert ended["result"]["text"] == "".join(f"word{n:03d} " for n in range(40))
        assert server.call("GET", f"runs/{run['id']}/events").text.splitlines() == lines
        assert containers(docker_api, user)[0]["Id"] == container
    finally:
        server.end()
    assert containers(docker_api, user) == []


# --- memory ---------------------------------------------------------------------------------------------------------


async def test_memory(user: str, docker_api: docker.APIClient, caplog: pytest.LogCaptureFixture) -> None:
    told: list[dict[str, Any]] = []
    caplog.set_level(logging.WARNING)
    script = "[[allocate 300 7]] [[sleep 5]] [[allocate 300 5]]"
    async with serving(user, memory_limit=600 * MB, memory_warning=420 * MB) as workspace:
        await workspace.create_agent("a")
        assert workspace.container
        container = workspace.container.id
        assert processes(docker_api, container, 0) == []  # nobody watches, so nobody samples
        with workspace.listening(told.append):
            run = await workspace.start_run("a", {"prompt": script})
            await eventually(lambda: workspace.memory and workspace.memory["level"] == "warning", 30)
            stats = await asyncio.to_thread(docker_api.stats, container, stream=False)
            shown = workspace.memory
            await end_of(workspace, run, 60)
            await eventually(lambda: workspace.memory and not workspace.memory["runs"])
        await eventually(lambda: not processes(docker_api, container, 0))
    memory = stats["memory_stats"]
    usage, inactive = memory["usage"], memory["stats"].get("total_inactive_file", memory["stats"].get("inactive_file"))
    assert shown
    assert shown["used_bytes"] == pytest.approx(usage - inactive, abs=30 * MB)
    assert shown["limit_bytes"] == 600 * MB
    assert shown["runs"].keys() == {run.id}
    assert 300 * MB < shown["runs"][run.id] <= shown["used_bytes"]
    assert sum(message["type"] == "warning" for message in told) == 2
    assert sum("MB of 600 MB" in record.getMessage() for record in caplog.records) == 2
    samples = [message["memory"]["time"] for message in told if message["type"] == "memory"]
    assert len(samples) > 5
    assert all(1.5 < after - before < 6 for before, after in pairwise(samples))


async def test_memory_after_oom_kills(user: str) -> None:
    async with serving(user, memory_limit=500 * MB) as workspace:
        await finish(workspace, "a", "[[allocate 600 1]] [[allocate 600 1]]")
        await workspace.measure()
        assert workspace.memory
        assert workspace.memory["oom_kills"] == 2
        assert workspace.memory["runs"] == {}


# --- misfortunes ----------------------------------------------------------------------------------------------------


async def test_disk_full(user: str, docker_api: docker.APIClient) -> None:
    options = {"type": "tmpfs", "device": "tmpfs", "o": "size=8m"}
    docker_api.create_volume(f"full-{user}", "local", options, {LABEL: user, DEPLOYMENT_LABEL: ""})

    async def upload(name: str, data: bytes) -> None:
        async with workspace.receive_file("a", name, len(data)) as process:
            await process.write(data)
            await workspace.stored(name, process)

    async with serving(user) as workspace:
        await workspace.create_agent("a")
        await upload("kept.bin", b"old" * 1000)
        with pytest.raises(DiskFull) as e:
            await upload("kept.bin", b"x" * 9 * MB)
        assert (e.value.status, e.value.reason) == (507, "disk_full")
        async with workspace.open_file("a", "kept.bin") as opened:
            assert isinstance(opened, tuple)
            assert await opened[1].stdout.read(-1) == b"old" * 1000
        assert await listing(workspace, "a") == [".agent", ".env", "kept.bin"]  # no half of the other

        filling = await finish(workspace, "a", "[[run head -c 20000000 /dev/zero > fill.bin]] [[say on]]")
        assert not filling.active
        with pytest.raises(DiskFull):
            await workspace.start_run("a", {"prompt": "[[say hi]]" + "x" * 10**6})
        assert workspace.active_runs == []
        await workspace.delete_file("a", "fill.bin")
        assert (await finish(workspace, "a", "[[say hi]]")).state == "succeeded"


async def test_given_up_while_it_starts(user: str, docker_api: docker.APIClient) -> None:
    """A process in the container doesn't wait for ever for somebody who has gone."""
    async with serving(user) as workspace:
        container = await workspace.connect()
        starting = [asyncio.ensure_future(workspace.engine.exec(container, ["cat"], 1000)) for _ in range(8)]
        await asyncio.sleep(0.005)
        for task in starting:
            task.cancel()
        answers = await asyncio.gather(*starting, return_exceptions=True)
        assert any(isinstance(answer, asyncio.CancelledError) for answer in answers)
        for answer in answers:
            if not isinstance(answer, BaseException):
                answer.close()
        await asyncio.sleep(0.5)
        await eventually(lambda: not processes(docker_api, container.id, 1000))


class SlowForSome(DockerEngine):
    def _ensure(self, api: docker.APIClient, user: str, *args: Any) -> Any:
        if user.startswith("slow-"):
            time.sleep(6)
            raise Unavailable("It was too slow.", "engine_unavailable")
        return super()._ensure(api, user, *args)


async def test_slow_engine_holds_up_nobody_else(user: str) -> None:
    workspaces = Workspaces(config=Config(Workspaces={"engine_class": SlowForSome}))
    workspaces.start(user)
    lag = 0.0

    async def measure() -> None:
        nonlocal lag
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            lag = max(lag, time.monotonic() - before - 0.01)

    measuring = asyncio.ensure_future(measure())
    slow = [asyncio.ensure_future(workspaces.get(f"slow-{user}-{n}").connect()) for n in range(16)]
    await asyncio.sleep(0.1)
    began = time.monotonic()
    workspace = workspaces.get(user)
    await workspace.create_agent("a")
    await workspace.set_env("a", {"X": "y"})
    took = time.monotonic() - began
    assert not any(task.done() for task in slow)
    assert took < 5
    answers = await asyncio.gather(*slow, return_exceptions=True)
    assert all(isinstance(answer, Unavailable) for answer in answers)
    measuring.cancel()
    assert lag < 1
    await workspaces.stop()


@pytest.mark.parametrize("odd", ["..", "a/b", "../../etc", "a=b,c", "-v", "Ünï 用户", "x" * 300])
async def test_any_name_of_a_user_has_a_workspace_found_by_its_label(odd: str, docker_api: docker.APIClient) -> None:
    name = f"{odd}-{secrets.token_hex(4)}"
    try:
        async with serving(name) as workspace:
            await workspace.create_agent("a1")
            (volume,) = volumes(docker_api, name)
            assert workspace.container and workspace.container.user == name
            await workspace.stop()
            await workspace.connect()
            assert volumes(docker_api, name) == [volume]
            assert [agent["id"] for agent in workspace.list_agents()] == ["a1"]
            await workspace.stop(volume=True)
            assert volumes(docker_api, name) == containers(docker_api, name) == []
    finally:
        clean_up(docker_api, name)
