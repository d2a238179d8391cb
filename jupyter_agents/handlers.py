"""REST and WebSocket of the API: who may call what, and how it is put in HTTP. The logic is the workspace's."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import AsyncExitStack, aclosing, suppress
from functools import cached_property
from http.client import responses
from typing import Any
from urllib.parse import quote

from jupyter_server.auth.decorator import authorized, ws_authenticated
from jupyter_server.base.handlers import APIHandler, JupyterHandler
from jupyter_server.base.websocket import WebSocketMixin
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from . import contract
from .agents import check_agent_id
from .engine import Exec
from .errors import AgentsError, BadRequest, NotFound, TooLarge
from .link import Message
from .run import RUN_ID
from .runs import MAX_PROMPT
from .workspace import Workspace

MAX_JSON = 4 * MAX_PROMPT  # much of it may be escaped
MAX_SMALL_JSON = 2**16
MAX_MESSAGE = 2**16  # of a WebSocket, from its client
MAX_SUBSCRIPTIONS = 32
CHUNK = 2**16


class LengthRequired(AgentsError):
    status = 411


class WrongType(AgentsError):
    status = 415


class AgentsHandler(JupyterHandler):
    """What all handlers share: the caller's workspace, and errors as JSON."""

    auth_resource = "agents"

    @cached_property  # once for all of a socket: another one would be started for a user who is gone
    def workspace(self) -> Workspace:
        workspace: Workspace = self.settings["jupyter_agents"](self.current_user)
        return workspace

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        error = (kwargs.get("exc_info") or (None, None))[1]
        if self._headers_written:
            # Half an answer must not look like a whole one.
            self.request.connection.stream.close()  # type: ignore[union-attr]
            return
        super().send_error(error.status if isinstance(error, AgentsError) else status_code, **kwargs)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = (kwargs.get("exc_info") or (None, None))[1]
        body = {"message": responses.get(status_code, "Error"), "reason": f"http_{status_code}"}
        if isinstance(error, AgentsError):
            body = error.to_dict()
        elif isinstance(error, web.HTTPError):
            body["message"] = error.log_message or body["message"]
            body["reason"] = error.reason or body["reason"]
        elif status_code == 500:
            body = {
                "message": "Something went wrong in jupyter_agents; the server's log says more.",
                "reason": "internal_error",
            }
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(body))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if isinstance(value, AgentsError):
            self.log.info("%s %s: %s", self.request.method, self.request.path, value.reason)
        elif not isinstance(value, (asyncio.CancelledError, StreamClosedError)):
            super().log_exception(typ, value, tb)


class ApiHandler(AgentsHandler, APIHandler):
    """REST: JSON in, checked against the contract, and JSON out."""

    max_json = MAX_SMALL_JSON

    def body(self) -> Any:
        kind = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise WrongType("Send the request's body with Content-Type: application/json.", "wrong_content_type")
        return contract.load(self.request.body)

    async def prepare(self) -> None:  # type: ignore[override]
        if self.request.method in ("POST", "PATCH"):
            self.check_size(self.request.body)
        await super().prepare()

    def check_size(self, body: bytes | bytearray) -> None:
        if len(body) > self.max_json:
            raise TooLarge(f"The request is too large: it may have {self.max_json // 1024} KiB.", "too_large")

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str | None:
        """A query parameter that has a fixed set of values."""
        value = self.get_query_argument(name, None)
        if value is not None and value not in allowed:
            raise BadRequest(f"`{name}` may be {' or '.join(allowed)}.", "bad_request")
        return value

    def reply(self, value: Any, status: int = 200) -> None:
        self.set_status(status)
        self.finish(json.dumps(value))

    def done(self) -> None:
        self.set_status(204)
        self.finish()

    async def stream(self, process: Exec, size: int | None = None) -> None:
        """Send what a process prints, as fast as the client takes it. Cuts the connection if it isn't all."""
        sent = 0
        while chunk := await process.stdout.read(CHUNK):
            sent += len(chunk)
            self.write(chunk)
            await self.flush()
        whole = await self._ended_well(process) if size is None else sent == size
        if not whole:
            self.request.connection.stream.close()  # type: ignore[union-attr]  # the file shrank, or the container went
            raise StreamClosedError
        await self.finish(set_content_type=self._headers["Content-Type"])

    async def _ended_well(self, process: Exec) -> bool:
        try:
            return await process.wait() in (0, 1)  # 1 is tar's for a file that changed meanwhile
        except AgentsError:
            return False


class WorkspaceHandler(ApiHandler):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        self.reply(self.workspace.to_dict())

    @web.authenticated
    @authorized
    async def post(self) -> None:
        body = contract.check("startWorkspace", self.body()) if self.request.body else {}
        if "image" in body:
            await self.workspace.choose_image(body["image"])
        await self.workspace.connect()
        self.reply(self.workspace.to_dict())

    @web.authenticated
    @authorized
    async def delete(self) -> None:
        await self.workspace.stop(volume=self.one_of("volume", ("0", "1")) == "1")
        self.done()


class AgentsListHandler(ApiHandler):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        await self.workspace.refresh()
        self.reply(self.workspace.list_agents())

    @web.authenticated
    @authorized
    async def post(self) -> None:
        body = self.body()
        if isinstance(body, dict) and isinstance(body.get("id"), str):
            check_agent_id(body["id"])
        agent = await self.workspace.create_agent(contract.check("createAgent", body)["id"])
        self.reply(self.workspace.agent_to_dict(agent), 201)


class AgentHandler(ApiHandler):
    @web.authenticated
    @authorized
    async def get(self, agent: str) -> None:
        await self.workspace.refresh()
        self.reply(self.workspace.agent_to_dict(self.workspace.agent(agent)))

    @web.authenticated
    @authorized
    async def delete(self, agent: str) -> None:
        await self.workspace.remove_agent(agent)
        self.done()


class EnvHandler(ApiHandler):
    max_json = MAX_JSON

    @web.authenticated
    @authorized
    async def get(self, agent: str) -> None:
        self.reply(await self.workspace.env_names(agent))

    @web.authenticated
    @authorized
    async def patch(self, agent: str) -> None:
        await self.workspace.connect()
        self.workspace.agent(agent)
        self.reply(await self.workspace.set_env(agent, contract.check("setEnv", self.body())))


class DiffHandler(ApiHandler):
    @web.authenticated
    @authorized
    async def get(self, agent: str) -> None:
        self.finish(await self.workspace.diff(agent), set_content_type="text/x-diff; charset=utf-8")


@web.stream_request_body
class StreamedHandler(ApiHandler):
    """A handler whose request body comes in pieces.

    A refusal waits for the end of the body, unless that is long: an answer to half a request gets lost with the
    connection, which the server ends then.
    """

    refused = False

    async def prepare(self) -> None:  # type: ignore[override]
        try:
            await super().prepare()
            await self.admit()
        except (AgentsError, web.HTTPError) as e:
            if int(self.request.headers.get("Content-Length", 0)) > MAX_JSON:
                raise
            refusal = e

            async def refuse(*args: str, **kwargs: str) -> None:
                raise refusal

            self.refused = True
            setattr(self, str(self.request.method).lower(), refuse)

    async def admit(self) -> None:
        """Called before the body comes. Raises why it is not wanted."""


@web.stream_request_body
class FilesHandler(StreamedHandler):
    """Files of an agent. Bodies go through chunk by chunk in both directions."""

    _upload: AsyncExitStack | None = None
    _process: Exec

    def decode_argument(self, value: bytes | None, name: str | None = None) -> str:
        """Names of files are bytes; those that aren't UTF-8 are written as Python does. Without a path it is None."""
        return (value or b"").decode("utf-8", "surrogateescape")

    async def prepare(self) -> None:  # type: ignore[override]
        self._received = bytearray()
        await super().prepare()

    async def admit(self) -> None:
        if self.request.method == "PUT" and self.get_query_argument("type", "file") == "file":
            admission: Any = self.receive(self.path_kwargs["agent"], self.path_kwargs["path"] or "")
            await admission

    @web.authenticated
    @authorized
    async def receive(self, agent: str, path: str) -> None:
        """Before the body of an upload comes: may it, and is there a place for it?"""
        length = self.request.headers.get("Content-Length", "")
        if not length.isdigit():
            raise LengthRequired("An upload needs a Content-Length.", "length_required")
        self.request.connection.set_max_body_size(int(length) + 1)  # type: ignore[union-attr]
        upload = AsyncExitStack()
        self._process = await upload.enter_async_context(self.workspace.receive_file(agent, path, int(length)))
        self._upload = upload
        if self.request.connection.stream.closed():  # type: ignore[union-attr]
            self.on_finish()  # nobody else will say so: the connection closed before there was an upload

    async def data_received(self, chunk: bytes) -> None:
        if self._upload:
            await self._process.write(chunk)
        elif not self.refused:
            self._received += chunk
            self.check_size(self._received)

    def body(self) -> Any:
        self.request.body = bytes(self._received)
        return super().body()

    def on_finish(self) -> None:
        if self._upload:
            self._closing = asyncio.ensure_future(self._upload.aclose())

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self.on_finish()

    @web.authenticated
    @authorized
    async def get(self, agent: str, path: str = "") -> None:
        if self.one_of("format", ("tar",)):
            async with self.workspace.open_tar(agent, path) as process:
                name = path.rstrip("/").rpartition("/")[2] or agent
                self._attach(f"{name}.tar", "application/x-tar")
                await self.stream(process)
            return
        async with self.workspace.open_file(agent, path) as opened:
            if isinstance(opened, list):
                self.reply(opened)
                return
            size, process = opened
            self._attach(path.rpartition("/")[2], "application/octet-stream")
            self.set_header("Content-Length", size)
            await self.stream(process, size)

    def _attach(self, name: str, kind: str) -> None:
        # Never shown in place: a page that an agent wrote must not run with the server's origin.
        self.set_header("Content-Disposition", f"attachment; filename*=UTF-8''{quote(name, errors='replace')}")
        self.set_header("Content-Type", kind)
        self.set_header("X-Content-Type-Options", "nosniff")

    @web.authenticated
    @authorized
    async def put(self, agent: str, path: str = "") -> None:
        if self.one_of("type", ("file", "directory")) == "directory":
            self.reply(await self.workspace.make_folder(agent, path), 201)
            return
        self.reply(await self.workspace.stored(path, self._process), 201)

    @web.authenticated
    @authorized
    async def patch(self, agent: str, path: str = "") -> None:
        to = contract.check("moveFile", self.body())["path"]
        self.reply(await self.workspace.move_file(agent, path, to))

    @web.authenticated
    @authorized
    async def delete(self, agent: str, path: str = "") -> None:
        await self.workspace.delete_file(agent, path)
        self.done()


class AgentRunsHandler(ApiHandler):
    max_json = MAX_JSON

    @web.authenticated
    @authorized
    async def post(self, agent: str) -> None:
        body = self.body()
        if isinstance(body, dict) and isinstance(body.get("prompt"), str) and not body["prompt"].strip():
            raise BadRequest("The prompt is empty: say what the agent shall do.", "empty_prompt")
        run = await self.workspace.start_run(agent, contract.check("startRun", body))
        self.reply(run.to_dict(), 201)


class RunsHandler(ApiHandler):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        await self.workspace.refresh()
        agent = self.get_query_argument("agent", None)
        if agent is not None:
            self.workspace.agent(agent)
        self.reply([run.to_dict() for run in self.workspace.runs_of(agent)])


class RunHandler(ApiHandler):
    @web.authenticated
    @authorized
    async def get(self, run: str) -> None:
        await self.workspace.refresh()
        self.reply(self.workspace.run(run).to_dict())

    @web.authenticated
    @authorized
    async def delete(self, run: str) -> None:
        await self.workspace.refresh()
        self.reply((await self.workspace.cancel(run)).to_dict())


class RunEventsHandler(ApiHandler):
    _task: asyncio.Task[Any] | None = None

    @web.authenticated
    @authorized
    async def get(self, run: str) -> None:
        since = self.get_query_argument("since", "0")
        if not re.fullmatch("[0-9]{1,15}", since):
            raise BadRequest("`since` is the number of an event, from 0 on.", "bad_request")
        follow = self.one_of("follow", ("0", "1")) == "1"
        self._task = asyncio.current_task()
        self.set_header("Content-Type", "application/x-ndjson")
        try:
            async with aclosing(self.workspace.events(run, int(since), follow)) as batches:
                async for lines in batches:
                    self.write(b"".join(line + b"\n" for line in lines))
                    await self.flush()
        except (asyncio.CancelledError, StreamClosedError):
            return  # the reader has gone
        self._task = None
        await self.finish(set_content_type="application/x-ndjson")

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if self._task:
            self._task.cancel()


class OpenApiHandler(ApiHandler):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        await self.finish(contract.TEXT, set_content_type="application/yaml")


class EventsSocket(WebSocketMixin, WebSocketHandler, AgentsHandler):
    """The WebSocket `events` (docs/api.md). It keeps the caller's workspace while it is open.

    To a client that doesn't read, one message is under way, and what comes after that waits: subscriptions don't read
    on in their logs, nor is anything more read from the client, so that in the end its pings time out.
    """

    max_message_size = MAX_MESSAGE

    @ws_authenticated
    @authorized
    async def get(self, *args: Any, **kwargs: Any) -> None:
        await super().get(*args, **kwargs)

    def open(self, *args: Any, **kwargs: Any) -> None:
        super().open(*args, **kwargs)
        # What is not sent yet, by what it is about: only the newest matters to a slow reader.
        self._pending: dict[tuple[str, str], Message] = {}
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self._sent: asyncio.Future[None] | None = None
        self._queue(self.workspace.state_message())
        self._subscriptions: dict[str, asyncio.Task[None]] = {}
        self._sender = asyncio.ensure_future(self._send())

    def on_close(self) -> None:
        super().on_close()
        for task in [self._sender, *self._subscriptions.values()]:
            task.cancel()

    def _queue(self, message: Message) -> None:
        about = message["run"]["id"] if message["type"] == "run" else ""
        self._pending[message["type"], about] = message
        self._wake.set()

    async def _write(self, message: str | Message) -> None:
        """Send a message, once all before it is sent, whose sender may have been cancelled meanwhile."""
        async with self._turn:
            if self._sent:
                await asyncio.wait({self._sent})
            self._sent = asyncio.ensure_future(self.write_message(message))
            await asyncio.shield(self._sent)

    async def _send(self) -> None:
        try:
            with self.workspace.listening(self._queue):
                while True:
                    await self._wake.wait()
                    self._wake.clear()
                    while self._pending:
                        await self._write(self._pending.pop(next(iter(self._pending))))
        except WebSocketClosedError:
            pass

    async def on_message(self, message: str | bytes) -> None:
        try:
            asked = contract.load(message if isinstance(message, bytes) else message.encode())
            if not isinstance(asked, dict):
                raise BadRequest("A message is a JSON object.", "bad_request")
            if isinstance(asked.get("subscribe"), str):
                since = asked.get("since", 0)
                if not isinstance(since, int) or isinstance(since, bool) or not 0 <= since < 10**15:
                    raise BadRequest("`since` is the number of an event, from 0 on.", "bad_request")
                self._subscribe(asked["subscribe"], since)
            elif isinstance(asked.get("unsubscribe"), str):
                self._unsubscribe(asked["unsubscribe"])
            else:
                raise BadRequest("A message says `subscribe` or `unsubscribe`, and which run.", "bad_request")
        except AgentsError as e:
            with suppress(WebSocketClosedError):
                await self._write({"type": "error", **e.to_dict()})

    def _unsubscribe(self, run: str) -> None:
        task = self._subscriptions.pop(run, None)
        if task:
            task.cancel()

    def _subscribe(self, run: str, since: int) -> None:
        if not RUN_ID.fullmatch(run):
            raise NotFound("There is no such run: look at the list of runs.", "unknown_run")
        self._unsubscribe(run)
        if len(self._subscriptions) >= MAX_SUBSCRIPTIONS:
            raise BadRequest(f"A socket takes {MAX_SUBSCRIPTIONS} subscriptions; unsubscribe one.", "too_many_readers")
        self._subscriptions[run] = asyncio.ensure_future(self._stream(run, since))

    async def _stream(self, run: str, since: int) -> None:
        try:
            async with aclosing(self.workspace.events(run, since, follow=True)) as batches:
                async for lines in batches:
                    if lines:
                        head = json.dumps({"type": "events", "run": run, "since": since})[:-1].encode()
                        await self._write((head + b', "events": [' + b",".join(lines) + b"]}").decode())
                        since += len(lines)
            end = {"type": "end", "run": run, "next": since}
        except AgentsError as e:
            end = {"type": "error", "run": run, **e.to_dict()}
        except WebSocketClosedError:
            return
        with suppress(WebSocketClosedError):
            await self._write(end)
        self._subscriptions.pop(run, None)


AGENT = r"(?P<agent>[^/]+)"
RUN = r"(?P<run>[^/]+)"

ROUTES: list[tuple[str, type[AgentsHandler]]] = [
    (r"workspace", WorkspaceHandler),
    (r"agents", AgentsListHandler),
    (rf"agents/{AGENT}", AgentHandler),
    (rf"agents/{AGENT}/env", EnvHandler),
    (rf"agents/{AGENT}/diff", DiffHandler),
    (rf"agents/{AGENT}/files(?:/(?P<path>.*))?", FilesHandler),
    (rf"agents/{AGENT}/runs", AgentRunsHandler),
    (r"runs", RunsHandler),
    (rf"runs/{RUN}", RunHandler),
    (rf"runs/{RUN}/events", RunEventsHandler),
    (r"events", EventsSocket),
    (r"openapi\.yaml", OpenApiHandler),
]


def routes(base_url: str) -> list[tuple[str, type[AgentsHandler]]]:
    """The route table. The application's setting `jupyter_agents` maps the current user to a workspace."""
    return [(url_path_join(re.escape(base_url), "jupyter-agents", pattern), handler) for pattern, handler in ROUTES]
