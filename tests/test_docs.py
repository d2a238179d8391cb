"""What the documents say is so."""

from __future__ import annotations

import ast
import re

from conftest import ROOT

PACKAGE = ROOT / "jupyter_agents"

# From the way in to the ground: a module imports only from later ones. The client's side shares nothing with it.
LAYERS = [
    "app", "hub", "handlers", "workspaces", "workspace", "runs", "run", "agents", "link", "settings", "contract",
    "claude", "agentctl", "environment", "docker_engine", "engine", "errors",
]  # fmt: skip


def imports(module: str) -> set[str]:
    """Modules of ours that a module imports when it is loaded."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def test_modules_import_in_one_direction():
    for module in LAYERS:
        if module != "hub":
            below = set(LAYERS[LAYERS.index(module) + 1 :])
            assert imports(module) <= below, module


def test_only_the_docker_engine_imports_docker_when_the_server_loads():
    for module in LAYERS:
        if module not in ("hub", "docker_engine"):
            assert not re.search(r"^(import|from) docker\b", (PACKAGE / f"{module}.py").read_text(), re.M), module


def test_readme_has_every_setting_and_default():
    from settings import table  # type: ignore[import-not-found]

    readme = (ROOT / "README.md").read_text()
    assert table() in readme, "run scripts/settings.py and put its output into README.md"


def test_readme_names_only_files_that_are_there():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_no_machine_path_and_no_registry_host_is_committed():
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    hosts = re.compile(rb"registry\.(npmjs|yarnpkg)\.|pypi\.org/simple|files\.pythonhosted|/wo" + rb"rk/(main|venv)")
    for name in filter(None, files):
        path = ROOT / name
        if path.is_file():
            assert not hosts.search(path.read_bytes()), name
