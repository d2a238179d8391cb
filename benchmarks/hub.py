"""The Hub service under load: memory per connected user, latency of a REST call, events per second.

    python benchmarks/hub.py [--users 200] [--runs 60] [--real 10] [--seconds 10]

Everything of the service is real but three things: the Hub's answer to a token, the engine of all users but the
first `--real`, which lives in this process, and Claude in real containers, which is a shell script.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import multiprocessing
import os
import random
import statistics
import tarfile
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import psutil
from jupyterhub.services.auth import HubAuth
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from traitlets.config import Config

from jupyter_agents.docker_engine import DockerEngine
from jupyter_agents.engine import Container, Exec, Limits
from jupyter_agents.hub.configure import access_scope
from jupyter_agents.hub.service import AgentsHub, HubWorkspaces

PREFIX = "/services/jupyter-agents/"
RATE = 20  # events per second of each run
EVENT = b'{"type":"stream_event","event":{"type":"content_block_delta","delta":{"type":"text_delta","text":"word "}}}\n'
RESULT = b'{"type":"result","subtype":"success","is_error":false,"result":"done","session_id":"00000000-0000"}\n'
END = b'{"type":"run_end","exit_code":0,"reason":"","started":1,"ended":2,"oom_kills":0,"peak_bytes":1}\n'
CLAUDE = f"""#!/bin/sh
i=0
while [ $i -lt $COUNT ]; do
  echo '{EVENT.decode().strip()}'
  i=$((i+1)); sleep {1 / RATE}
done
echo '{RESULT.decode().strip()}'
"""


class StandIn:
    """A workspace in this process: what `agentctl` would say, and runs that are a log which grows by the clock."""

    def __init__(self, count: int):
        self.count = count
        self.runs: dict[str, float] = {}  # when it started

    def sample(self) -> bytes:
        lines = ["m memory.current 50000000", "m memory.max 1073741824", "m oom_kill 0", "m peak 1", "m free_kb 999999"]
        lines.append("a 10001 0 /workspace/agent-a")
        for number, (run, started) in enumerate(self.runs.items()):
            if time.monotonic() - started < self.count / RATE + 1:
                lines.append(f"p {100 + number} 1 10001 1000 {run}")
        return "\n".join(lines).encode() + b"\n\n"

    async def log(self, run: str, since: int) -> Any:
        started = self.runs[run]
        for number in range(since, self.count):
            await asyncio.sleep(max(0, started + number / RATE - time.monotonic()))
            yield EVENT
        yield RESULT
        yield END


class StandInExec(Exec):
    """One request to it."""

    stderr = b""

    def __init__(self, stand_in: StandIn, verb: str):
        self.stdout = asyncio.StreamReader()
        self._stand_in = stand_in
        self._request: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._more: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._serve(verb))

    async def _serve(self, verb: str) -> None:
        request = (await self._request).decode()
        values = dict(word.split("=", 1) for word in request.split() if "=" in word)
        feed, stand_in = self.stdout.feed_data, self._stand_in
        if verb == "watch":
            while not self._more.done():
                feed(stand_in.sample())
                await asyncio.sleep(2)
        elif verb == "sample":
            feed(stand_in.sample())
        elif verb == "run":
            feed(b"0\n")
            await self._more
            stand_in.runs[values["run"]] = time.monotonic()
            feed(b"started\n")
        if verb in ("run", "follow"):
            async for line in stand_in.log(values["run"], int(values.get("since", 0))):
                feed(line)
        self.stdout.feed_eof()

    async def write(self, data: bytes) -> None:
        future = self._more if self._request.done() else self._request
        if not future.done():
            future.set_result(data)

    async def wait(self) -> int:
        return 0

    def close(self) -> None:
        self._task.cancel()


class Mixed(DockerEngine):
    """Docker for users whose names begin with `real-`."""

    count = 200

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._stand_ins: dict[str, StandIn] = {}

    async def ensure(self, user: str, limits: Limits, image: str | None = None) -> Container:
        if user.startswith("real-"):
            container = await super().ensure(user, limits, image)
            script, out = CLAUDE.replace("$COUNT", str(self.count)).encode(), io.BytesIO()
            with tarfile.open(fileobj=out, mode="w") as tar:
                info = tarfile.TarInfo("usr/local/bin/claude")
                info.size, info.mode = len(script), 0o755
                tar.addfile(info, io.BytesIO(script))
            await super().put(container, out.getvalue())
            return container
        self._stand_ins.setdefault(user, StandIn(self.count))
        return Container(id=user, name=user, user=user, image=self.image, running=True, started=time.time())

    async def put(self, container: Container, tar: bytes) -> None:
        if container.user.startswith("real-"):
            await super().put(container, tar)

    async def exec(self, container: Container, argv: list[str], uid: int) -> Exec:
        if container.user.startswith("real-"):
            return await super().exec(container, argv, uid)
        return StandInExec(self._stand_ins[container.user], argv[-1])


class Believing(HubAuth):
    """Takes a token for the name of its user."""

    async def _believe(self, token: str) -> dict[str, Any]:
        return {"kind": "user", "name": token, "groups": [], "scopes": [access_scope()]}

    def user_for_token(self, token: str, **options: Any) -> Any:
        return self._believe(token)


def serve(port: Any, count: int) -> None:
    """The service, in a process of its own, until that is ended."""

    async def main() -> None:
        Mixed.count = count
        config = Config(DockerEngine={"deployment": f"bench-{os.getpid()}"}, HubWorkspaces={"engine_class": Mixed})
        service = AgentsHub(config=config, prefix=PREFIX, log_level="ERROR")
        service.hub_auth = Believing(api_token="none")
        service.workspaces = HubWorkspaces(parent=service)
        server = HTTPServer(service.application())
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        service.workspaces.start()
        port.send(sockets[0].getsockname()[1])
        await asyncio.to_thread(port.recv)
        for workspace in service.workspaces:
            if workspace.user.startswith("real-"):
                await workspace.stop(volume=True)

    asyncio.run(main())


class Load:
    def __init__(self, session: aiohttp.ClientSession, options: argparse.Namespace):
        self.session = session
        self.options = options
        real = [f"real-{n}" for n in range(options.real)]
        self.users = real + [f"user-{n}" for n in range(options.users - options.real)]
        self.events = 0
        self.ended = 0

    def headers(self, user: str) -> dict[str, str]:
        return {"Authorization": f"token {user}"}

    async def call(self, user: str, method: str, path: str, **body: Any) -> Any:
        async with self.session.request(method, path, headers=self.headers(user), json=body or None) as answer:
            value = await answer.json()
            if answer.status >= 400:
                raise RuntimeError(value)
            return value

    async def connect(self, user: str) -> aiohttp.ClientWebSocketResponse:
        socket = await self.session.ws_connect("events", headers=self.headers(user))
        async for message in socket:
            told = message.json()
            if told["type"] == "state" and told["workspace"]["state"] == "ready":
                break
        return socket

    async def listen(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            told = message.json()
            self.events += len(told["events"]) if told["type"] == "events" else 0
            self.ended += told["type"] == "end"

    async def ask(self, until: float) -> Iterator[float]:
        """Latencies of calls by random users, one after another."""
        took = []
        while time.monotonic() < until:
            begun = time.monotonic()
            await self.call(random.choice(self.users), "GET", "workspace")
            took.append(time.monotonic() - begun)
            await asyncio.sleep(0.02)
        return iter(took)


async def measure(port: int, service: psutil.Process, options: argparse.Namespace) -> None:
    base = f"http://127.0.0.1:{port}{PREFIX}jupyter-agents/"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base, connector=connector) as session:
        load = Load(session, options)
        await load.call("warm", "GET", "workspace")
        before = service.memory_info().rss
        sockets = dict(zip(load.users, await asyncio.gather(*map(load.connect, load.users)), strict=True))
        await asyncio.sleep(4)
        per_user = (service.memory_info().rss - before) / len(load.users)
        listening = [asyncio.create_task(load.listen(socket)) for socket in sockets.values()]

        idle = sorted(await load.ask(time.monotonic() + options.seconds / 2))
        runners = load.users[: options.runs]
        for user in runners:
            if "a" not in [agent["id"] for agent in await load.call(user, "GET", "agents")]:
                await load.call(user, "POST", "agents", id="a")
        for user in runners:
            run = await load.call(user, "POST", "agents/a/runs", prompt="go")
            await sockets[user].send_json({"subscribe": run["id"], "since": 0})
        begun, seen = time.monotonic(), load.events
        busy = sorted(await load.ask(begun + options.seconds))
        rate = (load.events - seen) / (time.monotonic() - begun)
        while load.ended < len(runners) and time.monotonic() < begun + 10 * options.seconds:
            await asyncio.sleep(0.1)
        for task in listening:
            task.cancel()
        print(f"{options.users} connected users, {options.real} of them with real containers, {len(runners)} runs\n")
        print("| | |\n|---|---|")
        print(f"| memory of the service, per connected user | {per_user / 2**10:.0f} kB |")
        for name, took in (("idle", idle), (f"with {len(runners)} runs", busy)):
            p50, p99 = statistics.median(took), took[int(len(took) * 0.99)]
            print(f"| a REST call, {name}: p50, p99 | {p50 * 1e3:.1f} ms, {p99 * 1e3:.1f} ms |")
        print(f"| events per second, of {len(runners) * RATE} made | {rate:.0f} |")
        print(f"| runs whose events all came | {load.ended} of {len(runners)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("users", 200), ("runs", 60), ("real", 10), ("seconds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    here, there = multiprocessing.Pipe()
    service = multiprocessing.get_context("spawn").Process(target=serve, args=(there, RATE * options.seconds))
    service.start()
    there.close()  # so that nobody waits for a service that has failed
    port = here.recv()
    try:
        asyncio.run(measure(port, psutil.Process(service.pid), options))
    finally:
        here.send("end")
        service.join(60)


if __name__ == "__main__":
    main()
