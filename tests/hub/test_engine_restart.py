"""dockerd itself is restarted under the service: one of the tests' own, since that of the machine has other users."""

from __future__ import annotations

import contextlib
import glob
import html
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest
import requests
from playwright.sync_api import expect

from .helpers import a_browser, container_of, events_of, open_lab, refusal
from .running import ROOT, Hub, User, token, wait_for

AWAY = "The workspaces of this Hub are not available just now"
IMAGE = "jupyter-agents:latest"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start a Docker engine")


class Engine:
    """A Docker engine with all that it owns in a directory of its own, and a network namespace of its own.

    Two engines in one namespace take each other's bridges away. `namespace` is the id of a process in it.
    """

    def __init__(self, directory: Path, namespace: int):
        self.directory = directory
        self.url = f"unix://{directory}/docker.sock"
        self.log = directory / "log"
        self._command = ["nsenter", f"--net=/proc/{namespace}/ns/net", "dockerd", "--host", self.url]
        for option, name in (("data-root", "data"), ("exec-root", "exec"), ("pidfile", "pid")):
            self._command += [f"--{option}", f"{directory}/{name}"]
        self._command += ["--cgroup-parent", f"/{directory.name}"]  # tells what is its own

    def start(self, *options: str) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([*self._command, *options], stdout=log, stderr=log, start_new_session=True)
        wait_for(self._answers, f"dockerd answers, see {self.log}")
        self.api = docker.APIClient(self.url)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()[-3000:]
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(f"{self.directory}/docker.sock") == 0

    def stop(self) -> None:
        """As a system does it: containers are stopped too, unless started with `--live-restore`."""
        self._process.terminate()
        self._process.wait(60)

    def crash(self) -> None:
        self._process.kill()
        self._process.wait()
        # Its containerd dies with it; where nobody buries the dead, the next dockerd would take that for alive.
        (self.directory / "exec" / "containerd" / "containerd.pid").unlink()

    def remove(self) -> None:
        if self._process.poll() is not None:
            self.start()
        for container in self.api.containers(all=True):
            self.api.remove_container(container["Id"], force=True)
        self.api.close()
        self.stop()
        # A crash leaves shims behind whose container ended meanwhile, and containers that were just being made.
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                about = Path(f"/proc/{process.pid}")
                if self.directory.name in (about / "cmdline").read_text() + (about / "cgroup").read_text():
                    process.kill()
        for cgroup in glob.glob(f"/sys/fs/cgroup/**/{self.directory.name}", recursive=True):
            for folder, _, _ in os.walk(cgroup, topdown=False):
                with contextlib.suppress(OSError):  # another controller's name for the same
                    os.rmdir(folder)
        subprocess.run(["umount", "--quiet", self.directory / "data"])  # after a crash it stays mounted on itself
        shutil.rmtree(self.directory)


@pytest.fixture(scope="module")
def near_model() -> Iterator[subprocess.Popen[str]]:
    """The scripted model in a network namespace of its own."""
    command = [sys.executable, str(ROOT / "demo" / "scripted_model.py"), "--host", "0.0.0.0"]
    with subprocess.Popen(["unshare", "--net", *command], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.terminate()


@pytest.fixture(scope="module")
def engine(docker_api: docker.APIClient, near_model: subprocess.Popen[str]) -> Iterator[Engine]:
    engine = Engine(Path(tempfile.mkdtemp(prefix="dockerd-")), near_model.pid)  # pytest's folders are too long for it
    engine.start()
    engine.api.load_image(docker_api.get_image(IMAGE, chunk_size=2**20))
    yield engine
    engine.remove()


@pytest.fixture(scope="module")
def hub(start_hub: Callable[..., Hub], engine: Engine, near_model: subprocess.Popen[str]) -> Iterator[Hub]:
    network = engine.api.inspect_network(engine.api.create_network("jupyter-agents")["Id"])
    assert near_model.stdout
    port = near_model.stdout.readline().strip().rpartition(":")[2]
    model = f"http://{network['IPAM']['Config'][0]['Gateway']}:{port}"
    hub = start_hub(DOCKER_HOST=engine.url, ANTHROPIC_BASE_URL=model)
    yield hub
    hub.stop()


def states_of(user: User) -> Iterator[dict[str, Any]]:
    """The workspace in all states that the user's server pushes, from now on."""
    return (message["workspace"] for message in user.client.watch() if message and message["type"] == "state")


def test_a_restart_of_dockerd_is_told_and_recovered_from_without_a_human(
    hub: Hub, engine: Engine, deployment: str, tmp_path: Path
) -> None:
    (ann,) = hub.add_users("restart-ann")
    ann.client.create_agent("a")
    ann.client.put("a", b"kept", "file")
    states = states_of(ann)
    with a_browser() as browser:
        page = open_lab(browser, ann)
        panel = page.locator(".jp-agents-panel")
        run = ann.client.start_run("a", "[[sleep 100]]")

        engine.stop()
        assert any(workspace["state"] == "unavailable" for workspace in states)
        error = refusal(ann.client, "GET", "agents")
        assert (error.status, error.reason) == (503, "engine_unavailable")
        expect(panel).to_contain_text(AWAY)
        wait_for(lambda: requests.get(f"{hub.service}/ready").status_code == 503, "not ready")  # told for 5 s more
        assert requests.get(f"{hub.service}/ready").json() == {"status": "not ready"}
        assert requests.get(f"{hub.service}/health").ok
        boss = hub.add_user("boss")
        assert "Docker doesn't answer" in html.unescape(boss.login().get(f"{hub.service}/").text)
        wait_for(lambda: "Docker doesn't answer" in hub.log.read_text(), "said in the log")

        engine.start()
        assert any(workspace["state"] == "ready" for workspace in states)
        expect(panel).not_to_contain_text(AWAY, timeout=30_000)
        wait_for(lambda: requests.get(f"{hub.service}/ready").ok, "ready again")
    assert run.status == "lost"
    assert ann.client.get("a", "file", tmp_path / "file").read_bytes() == b"kept"
    assert ann.client.start_run("a", "[[say back again]]").wait(60).text == "back again"
    container = container_of(deployment, ann.name, engine.api)
    assert container and container["HostConfig"]["Memory"] == 2**30
    metrics = requests.get(f"{hub.service}/metrics", headers=token(boss.new_token())).text
    assert 'jupyter_agents_engine_errors_total{reason="engine_unavailable"}' in metrics


def test_a_run_outlives_a_crash_of_dockerd_that_has_live_restore(hub: Hub, engine: Engine, deployment: str) -> None:
    engine.stop()
    engine.start("--live-restore")
    bob = hub.add_user("restart-bob")
    bob.direct.create_agent("a")
    run = bob.direct.start_run("a", "[[slow 80 0.2]]")
    watching = bob.direct.watch(run.id)
    seen = [next(watching), next(watching)]
    before = container_of(deployment, bob.name, engine.api)
    engine.crash()
    error = refusal(bob.direct, "GET", "agents")
    assert (error.status, error.reason) == (503, "engine_unavailable")
    engine.start("--live-restore")
    seen += watching
    assert run.wait(30).status == "succeeded" and run.text.split()[-1] == "word079"
    assert events_of(seen) == list(bob.direct.events(run.id))
    after = container_of(deployment, bob.name, engine.api)
    assert before and after and before["Id"] == after["Id"]
