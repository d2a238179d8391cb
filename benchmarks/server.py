"""A Jupyter server of its own, with or without the extension."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from jupyter_agents.client import Client


class Server:
    """Takes nothing from the machine's Jupyter configuration. Close it."""

    def __init__(self, extension: bool, config: dict[str, Any] | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="jupyter-agents-bench-")
        token = secrets.token_hex(16)
        others = ("jupyterlab", "jupyter_lsp", "jupyter_server_terminals", "notebook", "notebook_shim")
        settings = {
            **(config or {}),
            "IdentityProvider": {"token": token},
            "ServerApp": {
                "allow_root": True,
                "ip": "127.0.0.1",
                "jpserver_extensions": {**dict.fromkeys(others, False), "jupyter_agents": extension},
                "log_level": "ERROR",
                "open_browser": False,
                "port": 0,
            },
        }
        file = Path(self._folder.name, "config.json")
        file.write_text(json.dumps(settings))
        environment = {**os.environ, "JUPYTER_RUNTIME_DIR": self._folder.name, "JUPYTER_NO_CONFIG": "1"}
        command = [sys.executable, "-m", "jupyter_server", f"--config={file}"]
        log = Path(self._folder.name, "log")
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, env=environment, cwd=self._folder.name, stderr=output)
        info = Path(self._folder.name, f"jpserver-{self._process.pid}.json")
        while not (info.exists() and info.stat().st_size):
            if self._process.poll() is not None:
                raise RuntimeError(f"The Jupyter server did not start: {log.read_text()}")
            time.sleep(0.05)
        self.url = json.loads(info.read_text())["url"]
        self.client = Client(self.url, token)

    def resident_bytes(self) -> float:
        return float(psutil.Process(self._process.pid).memory_info().rss)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()
