"""That `make bench` works: all of it, small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import docker

from jupyter_agents.docker_engine import DEPLOYMENT_LABEL

ROOT = Path(__file__).parent.parent


def test_the_table_has_all_rows_and_nothing_is_left(docker_api: docker.APIClient) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--quick"]
    before = _deployments(docker_api)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [len(cells) for cells in table] == [6] * 17
    assert all(float(cells[1]) > 0 for cells in table[2:])
    assert not {name for name in _deployments(docker_api) - before if name.startswith("bench-")}


def test_the_service_is_measured_and_nothing_is_left(docker_api: docker.APIClient) -> None:
    sizes = ["--users=6", "--runs=3", "--real=2", "--seconds=2"]
    before = _deployments(docker_api)
    command = [sys.executable, ROOT / "benchmarks" / "hub.py", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "| runs whose events all came | 3 of 3 |" in done.stdout
    assert not {name for name in _deployments(docker_api) - before if name.startswith("bench-")}


def _deployments(docker_api: docker.APIClient) -> set[str]:
    label = {"label": DEPLOYMENT_LABEL}
    volumes = docker_api.volumes(filters=label)["Volumes"] or []
    return {made["Labels"][DEPLOYMENT_LABEL] for made in docker_api.containers(all=True, filters=label) + volumes}
