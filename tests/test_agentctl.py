"""The script in the container: it is clean, and a shell and tools as small as busybox's will do for it."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from helpers import IMAGE, containers, eventually, finish, log, nothing_left, output, processes, seen, serving, text

from jupyter_agents.docker_engine import AGENTCTL
from jupyter_agents.errors import NotFound, Protected


def test_shellcheck() -> None:
    checker = Path(sys.executable).parent / "shellcheck"
    subprocess.run([checker, "--shell=sh", AGENTCTL], check=True)


@pytest.fixture(scope="module")
def busybox_image(docker_api: docker.APIClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The workspace image with busybox in place of Debian's shell and tools."""
    folder = tmp_path_factory.mktemp("busybox")
    got = subprocess.run(["apt-get", "download", "busybox-static"], cwd=folder, capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"no busybox to be had: {got.stderr}")
    subprocess.run(["dpkg-deb", "-x", next(folder.glob("*.deb")), folder], check=True)
    binary = next(path for path in folder.rglob("busybox") if path.is_file() and path.parent.name == "bin")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.add(binary, "busybox")
    # Debian builds it without tar's options -T and --exclude, which are there by default.
    script = "mkdir /bb && /busybox --install /bb && rm /bb/tar && ln -sf /busybox /bin/sh"
    made = docker_api.create_container(IMAGE, ["sh", "-c", script], user="0", entrypoint=[])["Id"]
    docker_api.put_archive(made, "/", out.getvalue())
    docker_api.start(made)
    docker_api.wait(made)
    tag = f"jupyter-agents-test:{folder.parent.name}-busybox"
    docker_api.commit(made, *tag.split(":"), changes=["ENV PATH=/bb:/usr/local/bin:/usr/bin"])
    docker_api.remove_container(made)
    yield tag
    docker_api.remove_image(tag, force=True)


async def test_busybox(user: str, model: str, docker_api: docker.APIClient, busybox_image: str) -> None:
    async with serving(user, docker={"image": busybox_image}) as workspace:
        await workspace.create_agent("a")
        assert workspace.container
        assert "BusyBox" in output(docker_api, workspace.container.id, "head", "--help")
        assert await workspace.set_env("a", {"X": "it's\nhere"}) == ["X"]
        run = await finish(workspace, "a", "[[write new.txt hello]] [[run printenv X]]")
        assert run.state == "succeeded"
        assert "it's\nhere" in text(run)
        assert "+++ b/new.txt\n@@ -0,0 +1 @@\n+hello" in await workspace.diff("a")
        events = await log(workspace, run)
        assert await log(workspace, run, 5) == events[5:]

        async with workspace.receive_file("a", "x/y z.bin", 5) as process:
            await process.write(b"12345")
            entry = await workspace.stored("x/y z.bin", process)
        assert (entry["name"], entry["type"], entry["size"]) == ("y z.bin", "file", 5)
        async with workspace.open_file("a", "x/y z.bin") as opened:
            assert isinstance(opened, tuple)
            assert (opened[0], await opened[1].stdout.read(-1)) == (5, b"12345")
        async with workspace.open_file("a", "") as entries:
            assert isinstance(entries, list)
            assert [(e["name"], e["type"]) for e in entries] == [
                (".agent", "directory"), (".env", "file"), ("new.txt", "file"), ("x", "directory")
            ]  # fmt: skip
        async with workspace.open_tar("a", "x") as process:
            with tarfile.open(fileobj=io.BytesIO(await process.stdout.read(-1))) as tar:
                assert "./y z.bin" in tar.getnames()
        await workspace.move_file("a", "new.txt", "x/old.txt")
        await workspace.delete_file("a", "x")
        with pytest.raises(NotFound):
            await workspace.delete_file("a", "x")
        with pytest.raises(Protected):
            async with workspace.open_file("a", ".env"):
                pass

        script = "setsid sleep 300 & env -i setsid sleep 300 & sleep 300"
        started = await workspace.start_run("a", {"prompt": f"[[run {script}]]"})
        following = asyncio.ensure_future(log(workspace, started, follow=True))
        await seen(workspace, started, "sleep 300")
        container, uid = workspace.container.id, workspace.agents["a"].uid
        await eventually(lambda: processes(docker_api, container, uid).count("sleep 300") == 3)
        assert (await workspace.cancel(started.id)).state == "cancelled"
        await nothing_left(docker_api, workspace, "a")
        assert (await following)[-1]["type"] == "run_end"
        timed = await finish(workspace, "a", "[[sleep 60]]", timeout=2)
        assert timed.state == "timed_out"
        with workspace.listening(lambda message: None):
            await eventually(lambda: workspace.memory)
            assert workspace.memory["used_bytes"] > 0
        await workspace.remove_agent("a")
        assert workspace.list_agents() == []
    for container in containers(docker_api, user):
        docker_api.remove_container(container["Id"], force=True)
