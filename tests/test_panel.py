"""The panel in a kernel of a real server with the scripted model, and its rarer states on a server that says them."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import docker
import ipywidgets
import pytest
from api_server import LIMITS, MEMORY, calls, says
from conftest import Server, clean_up
from helpers import eventually
from ipywidgets.widgets.widget import _instances
from jupyter_client.blocking import BlockingKernelClient
from tornado import httpserver, netutil, web, websocket

import jupyter_agents
from jupyter_agents.client import AgentsError, Client
from jupyter_agents.panel import KEPT_STEPS, MOST_STEPS, Panel

Cell = Callable[[str], str]

# --- in a kernel ------------------------------------------------------------------------------------------------

HELPERS = """
import asyncio, threading, urllib.parse
import psutil, jupyter_agents
from ipywidgets.widgets.widget import _instances
from jupyter_agents.client import Client

port = urllib.parse.urlsplit(Client.discover().url).port

async def until(check, seconds=30):
    for _ in range(seconds * 20):
        if check():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {shown(a)}")

def shown(panel):
    parts = (panel.notice, panel.memory, panel.counts, panel.hint, panel.status)
    return [part.value for part in parts], panel.agents._options_labels, transcript(panel)

def transcript(panel):
    steps = panel.steps.children[0].children[1:]
    return [step.value if hasattr(step, "value") else step.outputs[0]["data"]["text/markdown"] for step in steps]

async def finish(panel, prompt, state):
    await until(lambda: not panel.start.disabled)
    panel.prompt.value, last = prompt, panel.run
    panel.start.click()
    await until(lambda: panel.run != last and state in panel.status.value)
    assert panel.prompt.value == ""

def held():
    "What could be left behind; the workers of the loop's own executor stay with it."
    tasks = [task for task in map(repr, asyncio.all_tasks()) if "jupyter_agents" in task or "websocket" in task]
    threads = {thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}
    sockets = [c.status for c in psutil.Process().net_connections() if c.raddr and c.raddr.port == port]
    return tasks, threads, [status for status in sockets if status != "CLOSE_WAIT"], len(_instances)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(docker_api: docker.APIClient, model: str, folder: Path) -> Iterator[Server]:
    user = f"test-{secrets.token_hex(4)}"
    running = Server(user, folder)
    yield running
    running.stop()
    clean_up(docker_api, user)
    log = (folder / "log").read_text()  # with what the kernels said when they ended
    assert not [word for word in ("Traceback", "Exception", "never retrieved", "destroyed") if word in log], log


@pytest.fixture
def kernel(server: Server) -> str:
    with server.session() as session:
        return str(session.post(server.url("../api/kernels"), json={}).json()["id"])


@pytest.fixture
def cell(server: Server, kernel: str, folder: Path) -> Iterator[Cell]:
    """Runs a cell in a kernel of the server, and gives what it printed."""
    client = BlockingKernelClient()
    client.load_connection_file(str(folder / "RUNTIME" / f"kernel-{kernel}.json"))
    client.start_channels(hb=False)  # a kernel that starts slowly is not dead
    client.wait_for_ready(timeout=60)

    def run(code: str) -> str:
        said: list[str] = []

        def heard(message: dict[str, Any]) -> None:
            content = message["content"]
            assert message["msg_type"] != "error", "\n".join(content["traceback"])
            said.append(content.get("text", ""))

        client.execute_interactive(code, timeout=60, output_hook=heard)
        return "".join(said).strip()

    run(HELPERS)
    yield run
    client.stop_channels()


def test_two_panels_from_the_first_agent_to_nothing_left(cell: Cell) -> None:
    cell("before = held()")
    cell("a = jupyter_agents.panel()")
    cell("await until(lambda: 'of 1 GB memory' in a.memory.value and a.bar.value > 0)")
    assert "0 of 10 agents · 0 of 3 runs" in cell("print(a.counts.value)")
    cell("assert not a.create.disabled and a.start.disabled and a.stop.disabled and a.keep.disabled")

    cell("a.name.value = 'Bad Name'; a.create.click(); await until(lambda: 'name has 1 to 32 of' in a.notice.value)")
    cell("a.name.value = 'bot'; a.create.click(); await until(lambda: a.agents.value == 'bot')")
    assert cell("print(repr(a.notice.value), repr(a.name.value))") == "'' ''"
    cell("await until(lambda: not a.start.disabled); a.start.click()")
    cell("await until(lambda: 'The prompt is empty' in a.notice.value)")

    cell("%load_ext jupyter_agents")
    cell("%agent panel")
    cell("b = _; await until(lambda: b.agents.value == 'bot')")
    cell("a.prompt.value = '[[run echo **hi**]] [[say **bye** <b>]] [[slow 8 0.3]]'; a.start.click()")
    cell("await until(lambda: 'word001' in str(transcript(b)))")
    assert cell("print(a.start.disabled, a.stop.disabled, b.stop.disabled)") == "True False False"
    cell("assert 'pre-wrap' in transcript(b)[-1] and 'bot is running: wait for it' in b.hint.value")
    cell("await until(lambda: 'succeeded' in a.status.value and 'succeeded' in b.status.value)")
    assert cell("print(shown(a) == shown(b))") == "True"
    status = cell("print(a.status.value)")
    assert "3 turns" in status or "2 turns" in status
    assert "$0." in status and "tokens in" in status
    tool, answer = cell("print(transcript(a)[0]); print(transcript(a)[1:])").split("\n")
    assert tool.startswith("<details><summary><b>Bash</b> <code>echo &#42;&#42;hi")
    assert "**bye** &lt;b>" in answer and "pre-wrap" not in answer

    cell("assert not b.keep.disabled; await finish(b, '[[recall]]', 'succeeded')")
    cell("await until(lambda: 'This is prompt 2' in str(transcript(a)))")
    cell("b.keep.value = False; await finish(b, '[[recall]]', 'succeeded')")
    cell("await until(lambda: 'the first prompt of our conversation' in str(transcript(a)))")

    cell("a.prompt.value = '[[sleep 60]]'; a.start.click(); await until(lambda: 'echo started' in str(transcript(b)))")
    cell("b.stop.click(); await until(lambda: 'cancelled' in a.status.value and a.stop.disabled and b.stop.disabled)")

    cell("a.close()")
    cell("await asyncio.sleep(1); assert held()[0] and held()[2], held()")
    cell("b.close(); a.close()")
    cell("await until(lambda: held() == before)")
    assert cell("print(len(_instances))") == "0"


def test_a_click_comes_after_the_text_that_was_written_before_it(cell: Cell, kernel: str, folder: Path) -> None:
    cell("import time; a = jupyter_agents.panel(); seen = []; a.create.on_click(lambda _: seen.append(a.name.value))")
    name, create = cell("print(a.name.model_id, a.create.model_id)").split()
    front_end = BlockingKernelClient()
    front_end.load_connection_file(str(folder / "RUNTIME" / f"kernel-{kernel}.json"))
    front_end.start_channels(hb=False)
    front_end.control_channel.send(front_end.session.msg("create_subshell_request", {}))
    subshell = front_end.get_control_msg(timeout=30)["content"]["subshell_id"]

    def say(widget: str, data: dict[str, Any]) -> None:
        message = front_end.session.msg("comm_msg", {"comm_id": widget, "data": data})
        message["header"]["subshell_id"] = subshell
        front_end.shell_channel.send(message)

    texts = ["Bad name 1", "Bad name 2", "Bad name 3"]
    for number, text in enumerate(texts, 1):
        cell("a.name.send_state('placeholder')")  # the main shell has spoken last
        front_end.execute("time.sleep(0.5)")  # it is busy, while a subshell is not
        say(name, {"method": "update", "state": {"value": text}})
        say(create, {"method": "custom", "content": {"event": "click"}})
        cell(f"await until(lambda: len(seen) == {number} and not a.create.disabled)")
    front_end.stop_channels()
    assert cell("print(seen)") == str(texts)


def test_a_restart_and_the_end_of_the_server_leave_nothing(cell: Cell, server: Server, kernel: str) -> None:
    cell("a = jupyter_agents.panel(); await until(lambda: 'of 1 GB memory' in a.memory.value)")
    with server.session() as session:
        session.post(server.url(f"../api/kernels/{kernel}/restart")).raise_for_status()
    cell(f"{HELPERS}\nassert held()[0] == held()[2] == [] and not _instances, held()")
    cell("a = jupyter_agents.panel(); await until(lambda: 'of 1 GB memory' in a.memory.value)")


# --- what a server may say --------------------------------------------------------------------------------------

RUN = "20250101-000000-00000000"


class Speaker:
    """Says `state` to each WebSocket, then what `say` is given; a run has the events in `events`."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {
            "type": "state",
            "workspace": {"state": "ready", "limits": LIMITS, "memory": MEMORY, "active_runs": 0, "problem": None},
            "agents": [],
        }
        self.events: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        self.sockets: set[Any] = set()
        self.delay = 0.0
        self.connecting = self.opened = False
        self.refuse: tuple[int, Any] | None = None
        self.client: Client
        self.port = 0

    async def start(self, port: int = 0) -> None:
        [socket] = netutil.bind_sockets(port, "127.0.0.1")
        self.port = socket.getsockname()[1]
        self.client = Client(f"http://127.0.0.1:{self.port}/", "t")
        routes = [("/jupyter-agents/events", Events, {"server": self})]
        self._http = httpserver.HTTPServer(web.Application(routes, log_function=str))  # type: ignore[arg-type]
        self._http.add_socket(socket)

    async def stop(self) -> None:
        self._http.stop()
        for handler in list(self.sockets):
            handler.close()
        await self._http.close_all_connections()

    def agent(self, run_state: str = "running", **more: Any) -> dict[str, Any]:
        """Let there be an agent with a run."""
        run = {"id": RUN, "agent": "bot", "state": run_state, "prompt": "<b>go</b>", "started": time.time()}
        run.update(ended=None, activity=None, result=None, error=None, oom_kills=0)
        active = RUN if run_state == "running" else None
        agent = {"id": "bot", "run": active, "activity": None, "last_run": run, "has_session": True}
        self.state["agents"] = [{**agent, **more}]
        return run

    def say(self, **message: Any) -> None:
        for socket in self.sockets:
            socket.write_message(message)

    def memory(self, **memory: Any) -> None:
        self.say(type="memory", memory={**MEMORY, **memory})


class Events(websocket.WebSocketHandler):
    def initialize(self, server: Speaker) -> None:
        self.server = server

    async def prepare(self) -> None:
        self.server.connecting = True
        await asyncio.sleep(self.server.delay)
        assert self.request.headers["Authorization"] == "token t"
        if self.server.refuse:
            self.set_status(self.server.refuse[0])
            self.finish(self.server.refuse[1])

    def open(self) -> None:
        self.server.opened = True
        self.server.sockets.add(self)
        self.write_message(self.server.state)

    def on_close(self) -> None:
        self.server.sockets.discard(self)

    def on_message(self, message: str | bytes) -> None:
        asked = json.loads(message)
        self.server.asked.append(asked)
        if "subscribe" in asked:
            since = asked["since"]
            self.write_message({"type": "events", "run": RUN, "since": since, "events": self.server.events[since:]})


@asynccontextmanager
async def showing(server: Speaker) -> AsyncIterator[Panel]:
    """A panel of this server. Nothing is left of it in the end."""
    await server.start()
    panel = jupyter_agents.panel(server.client)
    try:
        yield panel
    finally:
        panel.close()
        await eventually(lambda: not server.sockets)
        await server.stop()
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    assert not _instances


def steps(panel: Panel) -> list[Any]:
    return list(panel.steps.children[0].children[1:])


def markdown(step: ipywidgets.Output) -> str:
    return str(step.outputs[0]["data"]["text/markdown"])


async def test_the_server_goes_and_comes_back() -> None:
    server = Speaker()
    server.agent()
    server.events = says("one")
    async with showing(server) as panel:
        await eventually(lambda: [markdown(step) for step in steps(panel)] == ["one"])
        assert not panel.stop.disabled
        await server.stop()
        await eventually(lambda: "be reached. This panel goes on as soon as it can." in panel.notice.value)
        assert panel.stop.disabled and panel.create.disabled and panel.start.disabled
        panel.name.value = "bot"
        panel.create.click()
        await eventually(lambda: "be reached; start it again" in panel.notice.value)
        server.events += says("two")
        await server.start(server.port)
        await eventually(lambda: [markdown(step) for step in steps(panel)] == ["one", "two"])
        assert server.asked == [{"subscribe": RUN, "since": 0}, {"subscribe": RUN, "since": 3}]
        assert not panel.stop.disabled


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (403, "", "doesn&#x27;t accept this kernel&#x27;s token"),
        (404, "<html>", "<code>jupyter server extension enable jupyter_agents</code>"),
        (500, "<html>", "failed (HTTP 500); its log says why."),
        (503, {"message": "Start <Docker>.", "reason": "engine_unavailable"}, "⚠ Start &lt;Docker&gt;."),
    ],
)
async def test_a_refusal_is_told_and_tried_again(status: int, body: Any, sentence: str) -> None:
    server = Speaker()
    server.refuse = status, body
    async with showing(server) as panel:
        await eventually(lambda: sentence in panel.notice.value)
        server.refuse = None
        await eventually(lambda: panel.notice.value == "" and "memory" in panel.memory.value)


async def test_memory_is_told_in_words() -> None:
    server = Speaker()
    async with showing(server) as panel:
        await eventually(lambda: (panel.memory.value, panel.bar.bar_style) == ("312 MB of 1 GB memory", "success"))
        server.memory(used_bytes=850 * 2**20, level="warning")
        await eventually(lambda: panel.memory.value.startswith("⚠ Warning: 850 MB of 1 GB memory; at the limit, pro"))
        assert (panel.bar.bar_style, panel.bar.value / panel.bar.max) == ("warning", 850 / 1024)
        server.memory(used_bytes=2**30, level="critical", oom_kills=2)
        await eventually(lambda: panel.memory.value.startswith("✗ Critical: 1 GB of 1 GB memory"))
        assert panel.bar.bar_style == "danger" and panel.memory.value.endswith("· 2 killed for memory so far")


async def test_a_workspace_that_is_not_available() -> None:
    server = Speaker()
    problem = {"message": "The image is missing.", "reason": "image_missing", "command": "jupyter agents build"}
    server.state["workspace"].update(state="unavailable", memory=None, problem=problem)
    async with showing(server) as panel:
        await eventually(lambda: "⚠ The image is missing.</b><br><code>jupyter agents build<" in panel.notice.value)
        assert "no figures yet, the workspace is unavailable" in panel.memory.value and panel.bar.value == 0


async def test_at_a_limit_the_controls_say_why_they_are_off() -> None:
    server = Speaker()
    server.agent("succeeded")
    server.state["agents"] = [{**server.state["agents"][0], "id": f"bot{n}"} for n in range(10)]
    server.state["workspace"]["active_runs"] = 3
    async with showing(server) as panel:
        await eventually(lambda: "10 of 10 agents · 3 of 3 runs · remove an agent before" in panel.counts.value)
        assert panel.create.disabled and panel.start.disabled
        assert "No more runs at a time: wait for one to end, or stop one." in panel.hint.value
        panel.agents.value = "bot7"
        server.say(**{**server.state, "agents": server.state["agents"][2:]})
        await eventually(lambda: len(panel.agents.options) == 8)
        assert panel.agents.value == panel.agent == "bot7"
        server.say(**{**server.state, "agents": server.state["agents"][:2]})
        await eventually(lambda: "Select an agent first." in panel.hint.value)
        assert panel.agents.value is None and panel.start.disabled


async def test_what_a_model_wrote_means_nothing_but_itself() -> None:
    hostile = "<script>document.title = 1</script>"
    server = Speaker()
    server.agent(activity=hostile)["activity"] = hostile
    server.events = [*calls(hostile, {"command": hostile}, hostile), *says(hostile)[:2]]
    async with showing(server) as panel:
        await eventually(lambda: len(steps(panel)) == 2)
        shown = [panel.status.value, *(step.value for step in steps(panel))]
        assert all("<script" not in text and "script" in text for text in shown)
        assert "<b>go" not in shown[0]


async def test_a_long_transcript_is_capped_and_what_is_complete_stays() -> None:
    server = Speaker()
    server.agent()
    server.events = [event for n in range(20) for event in says(f"step {n}")]
    async with showing(server) as panel:
        await eventually(lambda: len(steps(panel)) == 20)
        before = steps(panel)
        more = [event for n in range(20, MOST_STEPS + 1) for event in says(f"step {n}")]
        server.say(type="events", run=RUN, since=60, events=more[:-1])
        await eventually(lambda: len(steps(panel)) == KEPT_STEPS)
        assert "31 earlier steps are left out" in panel.steps.children[0].children[0].value
        assert before[0].comm is None
        kept = steps(panel)
        assert [markdown(step) for step in kept[:-1]] == [f"step {n}" for n in range(31, MOST_STEPS)]
        assert f"step {MOST_STEPS}</div>" in kept[-1].value
        server.say(type="events", run=RUN, since=182, events=[*says(f"step {MOST_STEPS}")[2:], *calls("Bash", {})[:1]])
        await eventually(lambda: len(steps(panel)) == KEPT_STEPS + 1)
        assert steps(panel)[:-2] == kept[:-1] and steps(panel)[-1].value.endswith(" …</summary></details>")
        server.say(type="end", run=RUN, next=190)  # as of a run that was lost
        await eventually(lambda: steps(panel)[-1].value.endswith(" ✗</summary></details>"))


async def test_a_failed_run_says_why() -> None:
    server = Speaker()
    run = server.agent("oom_killed")
    run.update(ended=run["started"] + 3, error={"message": "It took too much memory.", "reason": "oom_killed"})
    async with showing(server) as panel:
        await eventually(lambda: "✗ out of memory in 3.0 s" in panel.status.value)
        assert "⚠ It took too much memory." in panel.status.value
        server.say(type="error", run=RUN, message="There is no such run.", reason="unknown_run")
        await eventually(lambda: "There is no such run." in panel.notice.value)


async def test_a_panel_that_is_not_shown_any_more_lets_go() -> None:
    server = Speaker()
    server.agent()
    server.events = says("one")
    async with showing(server) as panel:
        panel._view_count = 1  # as the front end does
        await eventually(lambda: server.sockets and steps(panel))
        panel._view_count = 0
        await eventually(lambda: not server.sockets)
        server.events += says("two")
        panel._view_count = 1
        await eventually(lambda: [markdown(step) for step in steps(panel)] == ["one", "two"])


async def test_closing_while_it_connects() -> None:
    server = Speaker()
    server.delay = 0.5
    async with showing(server) as panel:
        await eventually(lambda: server.connecting)
        panel.close()
        await eventually(lambda: server.opened)


def test_a_terminal_has_no_panel() -> None:
    with pytest.raises(AgentsError, match="A panel needs a notebook"):
        jupyter_agents.panel()
    with pytest.raises(AttributeError, match="no attribute 'panels'"):
        _ = jupyter_agents.panels
