"""The floor: the same container, files and command by Docker's API alone."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import docker
import psutil

from jupyter_agents import agentctl, claude, environment
from jupyter_agents.docker_engine import DEPLOYMENT_LABEL, LABEL, DockerEngine

AGENT, UID = "floor", 59999


class Floor:
    """Raw calls to the engine that ours uses. What they make has the label of its deployment, as what ours makes."""

    def __init__(self, engine: DockerEngine):
        self.api = docker.from_env(timeout=120).api
        self.deployment = engine.deployment
        self._ca_bundle = "/etc/ssl/certs/ca-certificates.crt" if engine.certificates else ""

    def container_of(self, user: str) -> str:
        """Id of a user's workspace container."""
        labels = [f"{LABEL}={user}", f"{DEPLOYMENT_LABEL}={self.deployment}"]
        return str(self.api.containers(filters={"label": labels})[0]["Id"])

    def remove_all(self) -> None:
        label = {"label": f"{DEPLOYMENT_LABEL}={self.deployment}"}
        self.remove([container["Id"] for container in self.api.containers(all=True, filters=label)])
        for volume in self.api.volumes(filters=label)["Volumes"] or []:
            self.api.remove_volume(volume["Name"])

    def remove(self, containers: list[str]) -> None:
        for container in containers:
            self.api.remove_container(container, force=True)

    def start_like(self, workspace: str) -> str:
        """Create and start a container with the options of a workspace's, on a new volume; returns its id."""
        options = self.api.inspect_container(workspace)
        name = f"{self.deployment}-{secrets.token_hex(4)}"
        labels = {DEPLOYMENT_LABEL: self.deployment}
        mount = docker.types.Mount("/workspace", name, type="volume", labels=labels)
        config = {
            **options["Config"],
            "Labels": labels,
            "HostConfig": {**options["HostConfig"], "Mounts": [mount]},
        }
        made = self.api.create_container_from_config(config, name)["Id"]
        self.api.start(made)
        return str(made)

    def put_agent(self, container: str) -> None:
        """Make the floor's own directory, as an agent's is made."""
        self.api.put_archive(container, "/", agentctl.agent_tar(AGENT, UID))

    def exec(self, container: str, argv: list[str], uid: int = UID, **options: Any) -> Iterator[bytes]:
        """Start a command; what it prints, in pieces as they come."""
        made = self.api.exec_create(container, argv, user=f"{uid}:{uid}", **options)
        output: Iterator[bytes] = self.api.exec_start(made["Id"], stream=True)
        return output

    def claude(self, container: str, prompt: str) -> Iterator[bytes]:
        """Start Claude in the floor's directory, with the options and variables that a run of ours has."""
        home = f"/workspace/agent-{AGENT}"
        variables = environment.for_run(environment.passed_on(environment.PASSED_ON, {}), self._ca_bundle, "")
        variables |= {"HOME": home, "CLAUDE_CONFIG_DIR": f"{home}/.claude"}
        return self.exec(container, ["claude", *claude.options({}, None), prompt], workdir=home, environment=variables)

    def owner(self, container: str, path: str) -> int:
        return int(b"".join(self.exec(container, ["stat", "-c", "%u", path], uid=0)))

    def processes(self, container: str) -> float:
        return float(len(self.api.top(container)["Processes"]))

    def memory(self, containers: list[str]) -> float:
        """Bytes, as `docker stats` shows them, and what each container's shim adds outside of it where that is seen."""
        with ThreadPoolExecutor(len(containers)) as pool:
            stats = pool.map(lambda container: self.api.stats(container, stream=False)["memory_stats"], containers)
        samples = [agentctl.Sample({**one["stats"], "memory.current": one["usage"]}) for one in stats]
        inside: float = sum(sample.memory(0, 1)["used_bytes"] for sample in samples)
        return inside + sum(map(_shim, containers))


def _shim(container: str) -> float:
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"].startswith("containerd-shim") and container in (process.info["cmdline"] or []):
            return float(process.memory_full_info().pss)
    return 0


def until(words: bytes, output: Iterator[bytes]) -> None:
    """Read on until these bytes have come."""
    tail = b""
    for piece in output:
        tail = tail[-len(words) :] + piece
        if words in tail:
            return
    raise RuntimeError(f"{words!r} never came")
