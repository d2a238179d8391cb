"""A running JupyterHub and its users, as the tests see them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import psutil
import requests
import websocket

from jupyter_agents.client import Client

T = TypeVar("T")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROXY = shutil.which("configurable-http-proxy", path=f"{ROOT}/.dev/node_modules/.bin:{os.environ['PATH']}")
PASSWORD = "correct horse"
SERVICE_CONFIG = """
c = get_config()
c.DockerEngine.deployment = {deployment!r}
c.HubWorkspaces.group_limits = {{
    "small": {{"memory": 300 * 2**20, "agents": 1, "runs": 1}},
    "large": {{"memory": 600 * 2**20, "cpu": 0.5}},
}}
c.HubWorkspaces.user_limits = {{"erin": {{"agents": 2}}}}
c.AgentsHub.hub_interval = 1
c.TokenCache.accepted = 2
c.TokenCache.refused = 1
"""


def wait_for(condition: Callable[[], T], what: str, seconds: float = 30) -> T:
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"after {seconds} s still not: {what}")
        time.sleep(0.1)


def token(value: str) -> dict[str, str]:
    return {"Authorization": f"token {value}"}


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row."""
    for base in range(20000 + secrets.randbelow(20000), 60000, count):
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
    raise RuntimeError("no free ports")


class Hub:
    """One running Hub. `python` runs the Hub, its service and the users' servers.

    `deployment` is its own: a Hub's service removes workspaces of users that the Hub doesn't have. With a
    `service_token` the service is an external one, which the test runs. `hub_config` comes after all else.
    """

    def __init__(
        self,
        directory: Path,
        python: str,
        service_config: str,
        environment: dict[str, str],
        hub_config: str = "",
        service_token: str | None = None,
    ):
        self.directory = directory
        self.python = python
        self.port = free_ports(4)
        self.service_at = f"http://127.0.0.1:{self.port + 3}"
        self.service_token = service_token
        self.url = f"http://127.0.0.1:{self.port}/base"
        self.service = f"{self.url}/services/jupyter-agents"
        self.admin_token, self.stranger_token = secrets.token_hex(16), secrets.token_hex(16)
        self.deployment = f"hubtest-{secrets.token_hex(4)}"
        self.service_config = directory / "service_config.py"
        self.service_config.write_text(SERVICE_CONFIG.format(deployment=self.deployment) + service_config)
        self.log = directory / "hub.log"
        setup = {
            "port": self.port,
            "proxy": PROXY,
            "prefix": sys.prefix,
            "admin_token": self.admin_token,
            "stranger_token": self.stranger_token,
            "service_config": str(self.service_config),
            "service_token": service_token,
            "environment": environment,
            "hub_config": hub_config,
        }
        self.environment = {
            **os.environ,
            "HUB_TEST_SETUP": json.dumps(setup),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
            "CONFIGPROXY_AUTH_TOKEN": secrets.token_hex(16),
            "JUPYTER_PREFER_ENV_PATH": "1",
        }
        self._started: dict[int, psutil.Process] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.python, "-m", "jupyterhub", "-f", str(HERE / "jupyterhub_config.py")],
                cwd=self.directory,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(self.ready, f"Hub and service ready, see {self.log}", 60)

    def ready(self) -> bool:
        assert self._process and self._process.poll() is None, self.log.read_text()[-3000:]
        try:
            # The service itself before the proxy, which logs at length what it can't reach.
            services = [] if self.service_token else [f"{self.service_at}/base/services/jupyter-agents", self.service]
            return all(requests.get(f"{url}/health", timeout=5).ok for url in (*services, f"{self.url}/hub"))
        except requests.RequestException:
            return False

    def kill(self) -> None:
        """End only the Hub, without a chance to clean up."""
        assert self._process
        self._remember()
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        assert self._process
        self._remember()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        # Its watch over the proxy may have started another while it ended.
        for process in psutil.process_iter(["cmdline"]):
            if {PROXY, str(self.port)} <= set(process.info["cmdline"] or ()):
                self._started[process.pid] = process
        for process in self._started.values():  # psutil checks that the id is still that process
            with_children = [process, *_children(process)]
            for one in with_children:
                try:
                    one.kill()
                except psutil.NoSuchProcess:
                    pass

    def _remember(self) -> None:
        assert self._process
        if self._process.poll() is None:
            for process in _children(psutil.Process(self._process.pid)):
                self._started[process.pid] = process

    def service_process(self) -> psutil.Process:
        """The process that runs the service now."""
        return self._child("jupyter_agents.hub")

    def proxy_process(self) -> psutil.Process:
        """The process that is the proxy now."""
        assert PROXY
        return self._child(PROXY)

    def _child(self, argument: str) -> psutil.Process:
        def found() -> psutil.Process | None:
            assert self._process
            for process in _children(psutil.Process(self._process.pid)):
                try:
                    if argument in process.cmdline():
                        return process
                except psutil.Error:
                    pass
            return None

        return wait_for(found, f"{argument} runs")

    def wait_for_look(self) -> None:
        """Until the service knows who is in the Hub now."""

        def answers() -> int:
            return self.log.read_text().count(" 200 GET /base/hub/api/users?")

        # One look may have begun before; when a third is answered, the second is known.
        before = answers()
        wait_for(lambda: answers() >= before + 3, "the service looks at the Hub's users")

    def api(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        """A call of the Hub's API as its administrator."""
        return requests.request(method, f"{self.url}/hub/api/{path}", headers=token(self.admin_token), **kwargs)

    def add_user(self, name: str) -> User:
        """Make sure that there is such a user in the Hub."""
        response = self.api("POST", "users", json={"usernames": [name]})
        assert response.status_code in (201, 409), response.text
        return User(self, name)

    def add_users(self, *names: str) -> list[User]:
        """Users with their servers started, all at once."""
        users = [self.add_user(name) for name in names]
        with ThreadPoolExecutor() as pool:
            list(pool.map(User.spawn, users))
        return users


class User:
    """A user of the Hub. `client` goes through the user's own server, `direct` to the service."""

    def __init__(self, hub: Hub, name: str):
        self.hub = hub
        self.name = name
        self.path = f"users/{quote(name, safe='')}"
        self.server = f"{hub.url}/user/{quote(name, safe='@~')}"
        self.token = self.new_token()
        self.client = Client(self.server, self.token)
        self.direct = Client(hub.service, self.token)

    def new_token(self, **fields: Any) -> str:
        """A token of this user; `scopes` limits it, `expires_in` too."""
        response = self.hub.api("POST", f"{self.path}/tokens", json=fields)
        assert response.status_code == 201, response.text
        return str(response.json()["token"])

    def spawn(self) -> None:
        assert self.hub.api("POST", f"{self.path}/server").status_code in (201, 202, 400)
        wait_for(lambda: self.model()["servers"].get("", {}).get("ready"), f"server of {self.name}", 90)

    def model(self) -> dict[str, Any]:
        """What the Hub knows."""
        return dict(self.hub.api("GET", self.path).json())

    def login(self) -> requests.Session:
        """A browser of sorts, with the cookies of a login at the Hub."""
        session = requests.Session()
        page = f"{self.hub.url}/hub/login"
        session.get(page)
        xsrf = session.cookies.get("_xsrf", path="/base/hub/")
        form = {"username": self.name, "password": PASSWORD, "_xsrf": xsrf}
        assert session.post(page, data=form, allow_redirects=False).status_code == 302
        return session

    @contextmanager
    def kernel(self) -> Iterator[Callable[[str], str]]:
        """A kernel of the user's server, as a function that runs code in it and returns what that prints."""
        headers = token(self.token)
        kernel = requests.post(f"{self.server}/api/kernels", headers=headers, json={}).json()["id"]
        try:
            yield lambda code: self._execute(kernel, code)
        finally:
            requests.delete(f"{self.server}/api/kernels/{kernel}", headers=headers)

    def execute(self, code: str) -> str:
        """Run code in a kernel of its own; what it prints."""
        with self.kernel() as execute:
            return execute(code)

    def _execute(self, kernel: str, code: str) -> str:
        headers = token(self.token)
        channels = f"ws{self.server.removeprefix('http')}/api/kernels/{kernel}/channels"
        socket = websocket.create_connection(channels, header=headers, timeout=60)
        message = {
            "header": {"msg_id": "1", "msg_type": "execute_request", "username": "", "session": "1", "version": "5.3"},
            "parent_header": {},
            "metadata": {},
            "channel": "shell",
            "content": {"code": code, "silent": False, "store_history": False, "allow_stdin": False},
        }
        socket.send(json.dumps(message))
        printed = ""
        try:
            while True:
                reply = json.loads(socket.recv())
                if reply["parent_header"].get("msg_id") != "1":
                    continue
                content = reply["content"]
                if reply["msg_type"] == "stream":
                    printed += content["text"]
                elif reply["msg_type"] == "error":
                    raise AssertionError("\n".join(content["traceback"]))
                elif reply["msg_type"] == "status" and content["execution_state"] == "idle":
                    return printed
        finally:
            socket.close()


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
