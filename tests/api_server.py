"""A small server of the API for tests of its clients: real HTTP and a real WebSocket, runs as the test wants them."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tornado import httpserver, netutil, web, websocket

TOKEN = "secret-token"
LIMITS = {"memory_bytes": 2**30, "memory_warning_bytes": 800 * 2**20, "cpu": 1.0, "agents": 10, "runs": 3}
MEMORY = {
    "used_bytes": 312 * 2**20,
    "limit_bytes": 2**30,
    "level": "ok",
    "oom_kills": 0,
    "peak_bytes": 400 * 2**20,
    "runs": {},
    "time": 0.0,
}
RESULT = {
    "text": "Done.",
    "cost_usd": 0.0123,
    "input_tokens": 1234,
    "output_tokens": 56,
    "turns": 2,
    "duration": 1.5,
    "session_id": "s",
}


def says(text: str) -> list[dict[str, Any]]:
    """Events of a text that streams in two pieces."""
    half = len(text) // 2
    return [
        *(
            {
                "type": "stream_event",
                "event": {"type": "content_block_delta", "delta": {"type": "text_delta", "text": t}},
            }
            for t in (text[:half], text[half:])
        ),
        {"type": "assistant", "message": {"content": [{"type": "text", "text": text}]}},
    ]


def calls(name: str, arguments: dict[str, Any], result: Any = "", id: str = "t1", failed: bool = False) -> list[Any]:
    """Events of a tool call and its result."""
    use = {"type": "tool_use", "id": id, "name": name, "input": arguments}
    got = {"type": "tool_result", "tool_use_id": id, "content": result, "is_error": failed}
    return [
        {"type": "assistant", "message": {"content": [use]}},
        {"type": "user", "message": {"content": [got]}},
    ]


class Api:
    """What the server holds. `script(run)` is called on the server's loop for each run that is started.

    Tests may call `add` and `end` from their own thread. `refuse` answers everything with that status and body.
    """

    url: str

    def __init__(self) -> None:
        self.agents: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.env: dict[str, dict[str, str]] = {}
        self.diff = ""
        self.image = "standard"
        self.runs: dict[str, dict[str, Any]] = {}
        self.requests: list[dict[str, Any]] = []
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.script: Callable[[str], None] = lambda run: self.end(run)
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.refuse: tuple[int, str] | None = None
        self.cut_after: list[int] = []  # events after which the next connections are cut
        self.sockets: set[Any] = set()
        self.changed = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop

    def add(self, run: str, *events: dict[str, Any]) -> None:
        self.loop.call_soon_threadsafe(self._add, run, events)

    def _add(self, run: str, events: Any) -> None:
        self.events[run].extend(events)
        self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def end(self, run: str, state: str = "succeeded", message: str = "It failed; try again.") -> None:
        self.loop.call_soon_threadsafe(self._end, run, state, message)

    def _end(self, run: str, state: str, message: str) -> None:
        info = self.runs[run]
        if info["state"] != "running":
            return
        info.update(state=state, ended=info["started"] + 1.5, peak_bytes=400 * 2**20, result=RESULT)
        if state != "succeeded":
            info.update(error={"message": message, "reason": state})
        self.agents[info["agent"]]["state"] = "idle"
        self._add(run, [{"type": "run_end", "exit_code": 0, "reason": ""}])
        for socket in self.sockets:
            socket.say({"type": "run", "run": info})

    def start(self, agent: str, asked: dict[str, Any]) -> dict[str, Any]:
        run = f"20250101-000000-{len(self.runs):08x}"
        info = {
            "id": run,
            "agent": agent,
            "state": "running",
            "prompt": asked["prompt"][:2000],
            "model": asked.get("model"),
            "continued": False,
            "started": time.time(),
            "ended": None,
            "activity": None,
            "result": None,
            "error": None,
            "oom_kills": 0,
            "peak_bytes": None,
        }
        self.requests.append(asked)
        self.runs[run] = self.agents[agent]["last_run"] = info
        self.events[run] = []
        self.agents[agent].update(state="running", run=run)
        self.script(run)
        return info

    def workspace(self) -> dict[str, Any]:
        active = sum(run["state"] == "running" for run in self.runs.values())
        return {
            "name": "workspace-me",
            "user": "me",
            "state": "ready",
            "limits": LIMITS,
            "memory": MEMORY if self.sockets else None,
            "agents": len(self.agents),
            "active_runs": active,
            "started": 0.0,
            "image": self.image,
            "images": ["standard", "scientific"],
            "problem": None,
        }


class Refused(Exception):
    def __init__(self, status: int, message: str, reason: str):
        self.body = {"message": message, "reason": reason}
        self.status = status


class Handler(web.RequestHandler):
    api: Api

    def initialize(self, api: Api) -> None:
        self.api = api

    def prepare(self) -> None:
        self.api.seen.append((self.request.method, self.request.uri, dict(self.request.headers)))
        if self.api.refuse:
            self.set_status(self.api.refuse[0])
            self.finish(self.api.refuse[1])
        elif self.request.headers.get("Authorization") != f"token {TOKEN}":
            raise Refused(403, "Forbidden", "http_403")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs["exc_info"][1]
        if isinstance(error, Refused):
            self.set_status(error.status)
            self.finish(error.body)
        else:
            self.finish("<html>error page</html>")

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, (Refused, web.HTTPError)):
            super().log_exception(typ, value, tb)

    def agent(self, name: str) -> dict[str, Any]:
        if name not in self.api.agents:
            raise Refused(404, f"There is no agent {name}; create it first.", "unknown_agent")
        return self.api.agents[name]

    def run(self, run: str) -> dict[str, Any]:
        if run not in self.api.runs:
            raise Refused(404, f"There is no run {run}.", "unknown_run")
        return self.api.runs[run]

    def reply(self, value: Any, status: int = 200) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(value))


class Workspace(Handler):
    def get(self) -> None:
        self.reply(self.api.workspace())

    def post(self) -> None:
        self.api.image = json.loads(self.request.body)["image"]
        self.get()


class Agents(Handler):
    def get(self) -> None:
        self.reply([self.api.agents[name] for name in sorted(self.api.agents)])

    def post(self) -> None:
        name = json.loads(self.request.body)["id"]
        if name in self.api.agents:
            raise Refused(409, f"There is an agent {name} already.", "agent_exists")
        if not name.isalnum() or name != name.lower():
            raise Refused(400, f"{name!r} is no name for an agent.", "bad_agent_id")
        self.api.agents[name] = {
            "id": name,
            "state": "idle",
            "run": None,
            "activity": None,
            "last_run": None,
            "has_session": False,
            "created": 0.0,
        }
        self.api.files[name] = {}
        self.api.env[name] = {}
        self.reply(self.api.agents[name], 201)


class Agent(Handler):
    def get(self, name: str) -> None:
        self.reply(self.agent(name))

    def delete(self, name: str) -> None:
        self.agent(name)
        del self.api.agents[name]
        self.set_status(204)


class Env(Handler):
    def get(self, name: str) -> None:
        self.agent(name)
        self.reply(sorted(self.api.env[name]))

    def patch(self, name: str) -> None:
        self.agent(name)
        variables = self.api.env[name]
        variables.update(json.loads(self.request.body))
        self.api.env[name] = {key: value for key, value in variables.items() if value is not None}
        self.get(name)


class Diff(Handler):
    def get(self, name: str) -> None:
        self.set_header("Content-Type", "text/x-diff")
        self.finish(self.api.diff)


class Files(Handler):
    def get(self, name: str, path: str) -> None:
        self.agent(name)
        files, path = self.api.files[name], unquote(path)
        inside = {key: data for key, data in files.items() if key.startswith(path and f"{path}/")}
        if path in files:
            self.set_header("Content-Type", "application/octet-stream")
            self.finish(files[path])
        elif not inside and path:
            raise Refused(404, f"There is no file {path}.", "unknown_file")
        elif self.get_argument("format", "") == "tar":
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w") as tar:
                for key, data in inside.items():
                    info = tarfile.TarInfo(key.removeprefix(path).lstrip("/"))
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            self.set_header("Content-Type", "application/x-tar")
            self.finish(out.getvalue())
        else:
            self.reply(
                [{"name": k, "path": k, "type": "file", "size": len(d), "modified": 0.0} for k, d in inside.items()]
            )

    def put(self, name: str, path: str) -> None:
        self.agent(name)
        assert self.request.headers["Content-Length"].isdigit()
        self.api.files[name][unquote(path)] = self.request.body
        self.reply({"name": path, "path": path, "type": "file", "size": 0, "modified": 0.0}, 201)

    def delete(self, name: str, path: str) -> None:
        del self.api.files[name][unquote(path)]
        self.set_status(204)


class AgentRuns(Handler):
    def post(self, name: str) -> None:
        if self.agent(name)["state"] == "running":
            raise Refused(409, f"Agent {name} is busy.", "agent_busy")
        self.reply(self.api.start(name, json.loads(self.request.body)), 201)


class Runs(Handler):
    def get(self) -> None:
        agent = self.get_argument("agent", None)
        self.reply([run for run in reversed(self.api.runs.values()) if agent in (None, run["agent"])])


class Run(Handler):
    def get(self, run: str) -> None:
        self.reply(self.run(run))

    async def delete(self, run: str) -> None:
        self.run(run)
        self.api._end(run, "cancelled", "The run was cancelled.")
        self.reply(self.api.runs[run])


class RunEvents(Handler):
    async def get(self, run: str) -> None:
        self.run(run)
        since, cut = int(self.get_argument("since", "0")), self.api.cut_after and self.api.cut_after.pop(0)
        while True:
            changed, events = self.api.changed, self.api.events[run]
            while since < len(events):
                line = json.dumps(events[since]) + "\n"
                if cut is not None and cut != [] and since >= cut:
                    self.write(line[:10])
                    await self.flush()
                    self.request.connection.stream.close()
                    return
                self.write(line)
                since += 1
            await self.flush()
            if self.get_argument("follow", "0") == "0" or self.api.runs[run]["state"] != "running":
                return
            await changed.wait()


class Events(websocket.WebSocketHandler):
    def initialize(self, api: Api) -> None:
        self.api = api

    def prepare(self) -> None:
        self.api.seen.append((self.request.method, self.request.uri, dict(self.request.headers)))
        if self.request.headers.get("Authorization") != f"token {TOKEN}":
            self.set_status(403)
            self.finish()

    def say(self, message: dict[str, Any]) -> None:
        with suppress(websocket.WebSocketClosedError):
            self.write_message(json.dumps(message))

    def open(self) -> None:
        self.api.sockets.add(self)
        self.say({"type": "state", "workspace": self.api.workspace(), "agents": []})
        self.say({"type": "memory", "memory": MEMORY})

    def on_close(self) -> None:
        self.api.sockets.discard(self)

    async def on_message(self, message: str | bytes) -> None:
        asked = json.loads(message)
        run, since = asked["subscribe"], asked["since"]
        cut = self.api.cut_after.pop(0) if self.api.cut_after else None
        while run in self.api.runs:
            changed, events = self.api.changed, self.api.events[run]
            if cut is not None and len(events) >= cut:
                if events[since:cut]:
                    self.say({"type": "events", "run": run, "since": since, "events": events[since:cut]})
                self.close()
                return
            if events[since:]:
                self.say({"type": "events", "run": run, "since": since, "events": events[since:]})
                since = len(events)
            if self.api.runs[run]["state"] != "running":
                self.say({"type": "end", "run": run, "next": since})
                return
            try:
                await changed.wait()
            except asyncio.CancelledError:
                return  # the server ends
        self.say({"type": "error", "run": run, "message": f"There is no run {run}.", "reason": "unknown_run"})


def server_file(home: Path, server: Api, pid: int, **info: Any) -> None:
    """Tell clients about the server as Jupyter servers do."""
    content = {"url": server.url, "hostname": "localhost", "token": TOKEN, "pid": pid, **info}
    (home / "JUPYTER_RUNTIME_DIR" / f"jpserver-{pid}.json").write_text(json.dumps(content))


@contextmanager
def serving(port: int = 0) -> Iterator[Api]:
    """A server in a thread, until the end of the block."""
    api = Api()
    prefix, options = "/base/jupyter-agents/", {"api": api}
    routes: list[Any] = [
        ("workspace", Workspace),
        ("agents", Agents),
        ("agents/([^/]+)", Agent),
        ("agents/([^/]+)/env", Env),
        ("agents/([^/]+)/diff", Diff),
        ("agents/([^/]+)/files/(.*)", Files),
        ("agents/([^/]+)/runs", AgentRuns),
        ("runs", Runs),
        ("runs/([^/]+)", Run),
        ("runs/([^/]+)/events", RunEvents),
        ("events", Events),
    ]
    started, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        api.loop = asyncio.get_running_loop()
        sockets = netutil.bind_sockets(port, "127.0.0.1")
        api.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/base/"
        server = httpserver.HTTPServer(web.Application([(prefix + path, h, options) for path, h in routes]))
        server.add_sockets(sockets)
        started.set()
        await stop.wait()
        server.stop()
        for socket in list(api.sockets):
            socket.close()
        await server.close_all_connections()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    try:
        yield api
    finally:
        api.loop.call_soon_threadsafe(stop.set)
        thread.join()
