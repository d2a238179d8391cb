"""Open JupyterLab on the demo notebook, with a scripted model when there is no key for the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import docker
from docker.errors import NotFound

DEMO = Path(__file__).parent.parent / "demo"
NETWORK = "jupyter-agents"


def model_addresses() -> tuple[list[str], str]:
    """Where the model listens, and the name by which containers reach it."""
    if sys.platform != "linux":  # Docker Desktop leads from this name to the host's loopback
        return ["127.0.0.1"], "host.docker.internal"
    with closing(docker.from_env().api) as api:
        try:
            network = api.inspect_network(NETWORK)
        except NotFound:
            options = {"com.docker.network.bridge.enable_icc": "false"}
            network = api.inspect_network(api.create_network(NETWORK, driver="bridge", options=options)["Id"])
    gateway = network["IPAM"]["Config"][0]["Gateway"]
    return ["127.0.0.1", gateway], gateway


def run(lab: list[str]) -> int:
    """Its exit code. It gets an interrupt itself, and is waited for, since it removes the workspace when it ends."""
    with subprocess.Popen(lab, cwd=DEMO) as process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()


def main() -> int:
    lab = [sys.executable, "-m", "jupyterlab", "demo.ipynb", *sys.argv[1:]]
    if os.name == "posix" and os.getuid() == 0:  # as on the machines where we may start Docker
        lab.append("--allow-root")
    if os.environ.get("ANTHROPIC_API_KEY") or os.environ.get("CLAUDE_CODE_OAUTH_TOKEN"):
        return run(lab)
    hosts, name = model_addresses()
    command = [sys.executable, "scripted_model.py", "--host", *hosts]
    with subprocess.Popen(command, cwd=DEMO, stdout=subprocess.PIPE, text=True, start_new_session=True) as model:
        assert model.stdout
        port = model.stdout.readline().strip().rpartition(":")[2]
        print(
            "\n  No ANTHROPIC_API_KEY or CLAUDE_CODE_OAUTH_TOKEN is set: the demo's model is SCRIPTED, not Claude."
            "\n  The Claude Code CLI and everything around it is real. Set one of them for the real model.\n",
            flush=True,
        )
        os.environ.update(
            ANTHROPIC_BASE_URL=f"http://{name}:{port}",
            ANTHROPIC_API_KEY="scripted",
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        )
        try:
            return run(lab)
        finally:
            model.terminate()


if __name__ == "__main__":
    sys.exit(main())
