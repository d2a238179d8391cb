"""The wheel, installed like any other, outside the repository and without Node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT
from playwright.sync_api import Browser, expect

from .conftest import Lab, View


def test_the_wheel_holds_what_is_needed_and_one_version(wheel: Path) -> None:
    version = json.loads((ROOT / "labextension" / "package.json").read_text())["version"]
    assert wheel.name.startswith(f"jupyter_agents-{version}-py3-none-any")
    names = set(zipfile.ZipFile(wheel).namelist())
    data = f"jupyter_agents-{version}.data/data"
    assert {
        "jupyter_agents/openapi.yaml",
        "jupyter_agents/audit.yaml",
        "jupyter_agents/image/Dockerfile",
        "jupyter_agents/image/agentctl",
        f"{data}/share/jupyter/labextensions/jupyter-agents/package.json",
        f"{data}/etc/jupyter/jupyter_server_config.d/jupyter_agents.json",
    } <= names
    assert not [name for name in names if "node_modules" in name or name.startswith(("tests", "labextension"))]


def test_a_clean_environment_without_node(
    wheel: Path, tmp_path: Path, browser: Browser, start_lab: Callable[..., Lab]
) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel), "jupyterlab"], check=True, cwd=tmp_path)
    # Nothing of the repository, of this environment or of Node is to be found from there.
    variables = {"PATH": f"{environment / 'bin'}:/nowhere", "HOME": str(tmp_path), "LANG": "C.UTF-8"}

    def told(*command: str) -> str:
        done = subprocess.run(
            [python, "-m", *command], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120
        )
        return done.stdout + done.stderr

    assert "node" not in os.listdir(environment / "bin")
    front_ends = told("jupyter", "labextension", "list").splitlines()
    assert any("jupyter-agents" in line and "enabled" in line and "OK" in line for line in front_ends), front_ends
    extensions = told("jupyter", "server", "extension", "list").splitlines()
    assert any("jupyter_agents" in line and "enabled" in line for line in extensions), extensions
    lab = start_lab(environment=environment)
    lab.call("POST", "workspace")
    view = View(browser, lab).show()
    view.create("packed")
    view.run("[[say it works from a wheel]]")
    expect(view["text"]).to_contain_text("it works from a wheel")
    view.close()
