"""The panel of ipywidgets: `jupyter_agents.panel()`, or `%agent panel`.

A `Panel` is a view of a `Feed`, which all panels of a kernel share. Everything happens on the kernel's event loop:
calls of the API, which wait for the network in the loop's executor, come back to it before they change anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import sys
import time
import types
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import ipywidgets as widgets
from ipywidgets import Layout
from tornado import httpclient, websocket

from .client import AgentsError, Client, _refused
from .transcript import (
    TEXT_LIMIT,
    Item,
    Text,
    Transcript,
    clean,
    cut,
    item_markdown,
    outcome,
    render,
    seconds,
    shorten,
    size,
)

JSON = dict[str, Any]

REFRESH_SECONDS = 0.2
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 10.0
CONNECT_SECONDS = 10
MAX_MESSAGE = 2**26  # an event has up to 8 MiB, and several may come in one message
MOST_STEPS, KEPT_STEPS = 60, 30  # many are dropped at once, because all that follows is drawn anew then

LEVELS = {"ok": ("success", ""), "warning": ("warning", "⚠ Warning: "), "critical": ("danger", "✗ Critical: ")}
STOP_HINT = (
    "While a cell runs, the kernel hears no click here: Stop acts when the cell has ended. "
    "Stop in JupyterLab's side panel acts at any time."
)


# --- what all panels show ---------------------------------------------------------------------------------------


class Feed:
    """What goes on in the workspace, from one WebSocket that is open while there are panels.

    To be used on its `loop` only.
    """

    def __init__(self, client: Client, loop: asyncio.AbstractEventLoop):
        self.client = client
        self.loop = loop
        self.workspace: JSON | None = None
        self.memory: JSON | None = None
        self.agents: dict[str, JSON] = {}
        self.problem: AgentsError | None = None  # why there is no connection
        self.panels: set[Panel] = set()
        self._runs: dict[str, tuple[Transcript, int]] = {}  # with the number of the next event
        self._socket: websocket.WebSocketClientConnection | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._refreshing: asyncio.TimerHandle | None = None

    def add(self, panel: Panel) -> None:
        """Keep this panel up to date."""
        if not self.panels:
            self.spawn(self._listen())
        self.panels.add(panel)
        self.changed()

    def remove(self, panel: Panel) -> None:
        """With the last panel, all that goes on for them ends."""
        self.panels.discard(panel)
        if not self.panels:
            for task in self._tasks:
                task.cancel()
            self._runs.clear()
            self.client._session.close()  # its idle connections; it opens new ones when it has to

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The answer of one of the client's methods."""
        return await self.loop.run_in_executor(None, partial(method, *args, **options))

    def transcript(self, run: str) -> Transcript:
        """Of this run; it grows while a panel shows it."""
        if run not in self._runs:
            self._runs[run] = Transcript(), 0
            self._send({"subscribe": run, "since": 0})
        return self._runs[run][0]

    def changed(self) -> None:
        """Refresh the panels soon, once for all that changes until then."""
        if self._refreshing is None:
            self._refreshing = self.loop.call_later(REFRESH_SECONDS, self._refresh)

    def _refresh(self) -> None:
        self._refreshing = None
        for panel in self.panels:
            panel.refresh()
        for run in self._runs.keys() - {panel.run for panel in self.panels}:
            del self._runs[run]
            self._send({"unsubscribe": run})

    async def _listen(self) -> None:
        pause = RETRY_SECONDS
        while True:
            closed = asyncio.Event()
            try:
                self._socket = await self._connect(closed)
                self.problem = None
                pause = RETRY_SECONDS
                for run, (_, following) in self._runs.items():
                    self._send({"subscribe": run, "since": following})
                await closed.wait()
            except AgentsError as error:
                self.problem = error
                self.changed()
            finally:
                if self._socket:
                    self._socket.close()
                    self._socket = None
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)

    async def _connect(self, closed: asyncio.Event) -> websocket.WebSocketClientConnection:
        def take(message: str | bytes | None) -> None:
            if message is None:
                closed.set()
            else:
                self._take(json.loads(message))

        request = httpclient.HTTPRequest(
            "ws" + self.client.url.removeprefix("http") + "jupyter-agents/events",
            headers=self.client.headers,
            validate_cert=self.client._verify,
            connect_timeout=CONNECT_SECONDS,
            request_timeout=CONNECT_SECONDS,
        )
        opening = asyncio.ensure_future(
            websocket.websocket_connect(request, on_message_callback=take, max_message_size=MAX_MESSAGE)
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_discard)
            raise
        except httpclient.HTTPClientError as error:
            if error.response:  # else there was none in time
                raise _refused(error.code, error.response.body) from None
        except (OSError, websocket.WebSocketError):
            pass
        raise AgentsError(
            f"The Jupyter server at {self.client.url} can't be reached. This panel goes on as soon as it can.",
            "server_gone",
        )

    def _send(self, message: JSON) -> None:
        if self._socket:  # else it is told when there is one
            with contextlib.suppress(websocket.WebSocketClosedError):
                self._socket.write_message(json.dumps(message))

    def _take(self, message: JSON) -> None:
        kind, run = message["type"], message.get("run")
        if kind == "state":
            self.workspace = message["workspace"]
            self.memory = message["workspace"]["memory"]
            self.agents = {agent["id"]: agent for agent in message["agents"]}
        elif kind == "memory":
            self.memory = message["memory"]
        elif kind == "events" and run in self._runs:
            transcript, following = self._runs[run]
            for event in message["events"][max(0, following - message["since"]) :]:
                transcript.feed(event)
            self._runs[run] = transcript, message["since"] + len(message["events"])
        elif kind == "end" and run in self._runs:
            self._runs[run][0].feed({"type": "run_end"})  # a run that was lost has none of its own
        elif kind == "error":
            for panel in self.panels:
                if run is None or run == panel.run:
                    panel.error = AgentsError(message["message"], message["reason"], message.get("command"))
        self.changed()


def _discard(opened: asyncio.Future[websocket.WebSocketClientConnection]) -> None:
    if not opened.exception():
        opened.result().close()


# --- a panel ----------------------------------------------------------------------------------------------------


class Panel(widgets.VBox):
    """Memory, agents, a prompt and what becomes of it. `close()` ends it.

    It also stops to follow the workspace when its output is cleared, and goes on when it is shown again.
    """

    def __init__(self, feed: Feed):
        self._feed = feed
        self.error: AgentsError | None = None
        self.agent: str | None = None  # the one that is selected
        self.run: str | None = None  # the one that is shown
        self._acting: set[widgets.Button] = set()

        self.notice = widgets.HTML()
        self.bar = widgets.FloatProgress(min=0, max=1, layout=Layout(width="240px"))
        self.memory = widgets.HTML()
        self.agents = widgets.Select(description="Agents", rows=4, layout=Layout(width="auto"))
        self.agents.style.description_width = "initial"
        self.name = self._input(widgets.Text, "Name of a new agent", width="200px")
        self.create = self._button("Create agent", "plus", self._create)
        self.counts = widgets.HTML()
        self.prompt = self._input(widgets.Textarea, "What shall the agent do?", width="auto", height="5em")
        self.keep = widgets.Checkbox(True, description="Continue the conversation", indent=False)
        self.keep.layout.width = "auto"
        self.start = self._button("Run", "play", self._start, button_style="primary")
        self.stop = self._button("Stop", "stop", self._stop, tooltip=STOP_HINT)
        self.hint = widgets.HTML()
        self.status = widgets.HTML()
        self.steps = Steps()
        row = Layout(align_items="center", flex_flow="row wrap", grid_gap="0 8px")
        super().__init__(
            [
                self.notice,
                widgets.HBox([self.bar, self.memory], layout=row),
                self.agents,
                widgets.HBox([self.name, self.create, self.counts], layout=row),
                self.prompt,
                widgets.HBox([self.start, self.stop, self.keep, self.hint], layout=row),
                widgets.HTML(_small(STOP_HINT)),
                self.status,
                self.steps,
            ],
            layout=Layout(max_width="900px"),
            _view_count=0,  # which has the front end count its views
        )
        for widget in (self.agents, self.name, self.create, self.prompt, self.keep, self.start, self.stop):
            _in_order(widget)
        self.agents.observe(self._later(self._select), "index")
        # A reload of the page counts its views once more, so that clearing the output is not noticed after one.
        self.observe(self._later(self._viewed), "_view_count")
        self.refresh()
        feed.loop.call_soon_threadsafe(feed.add, self)

    def close(self) -> None:
        if self.comm is not None:
            self._feed.loop.call_soon_threadsafe(self._feed.remove, self)
            _close(self)

    def refresh(self) -> None:
        """Show what the feed knows. What has not changed is not sent."""
        self.agent = self.agents.value or self.agent or next(iter(self._feed.agents), None)
        agent = self._feed.agents.get(self.agent or "")
        self._show_workspace()
        self._show_agents()
        self._show_controls(agent)
        self._show_run(agent)

    # --- what is shown ------------------------------------------------------------------------------------------

    def _show_workspace(self) -> None:
        workspace, memory = self._feed.workspace, self._feed.memory
        problem = workspace["problem"] and AgentsError(**workspace["problem"]) if workspace else None
        error = self.error or self._feed.problem or problem
        self.notice.value = _notice(error) if error else ""
        if not workspace or not memory:
            state = f"the workspace is {workspace['state']}" if workspace else "connecting"
            self.bar.value, self.memory.value = 0, _small(f"Memory: no figures yet, {state}.")
            return
        self.bar.max = memory["limit_bytes"]
        self.bar.value = min(memory["used_bytes"], memory["limit_bytes"])
        self.bar.bar_style, text = LEVELS[memory["level"]]
        text += f"{size(memory['used_bytes'])} of {size(memory['limit_bytes'])} memory"
        if memory["level"] != "ok":
            text += "; at the limit, processes are killed"
        if memory["oom_kills"]:
            text += f" · {memory['oom_kills']} killed for memory so far"
        self.memory.value = text

    def _show_agents(self) -> None:
        agents = self._feed.agents
        with self.agents.hold_sync():
            self.agents.options = [(_label(agent), name) for name, agent in agents.items()]
            self.agents.value = self.agent if self.agent in agents else None
        self.agents.layout.display = None if agents else "none"

    def _show_controls(self, agent: JSON | None) -> None:
        workspace, agents = self._feed.workspace, len(self._feed.agents)
        most_agents = most_runs = active = 0
        if workspace:
            most_agents, most_runs = workspace["limits"]["agents"], workspace["limits"]["runs"]
            active = workspace["active_runs"]
        off = not workspace or bool(self._feed.problem)
        running = bool(agent and agent["run"])
        self.create.disabled = off or agents >= most_agents or self.create in self._acting
        self.start.disabled = off or not agent or running or active >= most_runs or self.start in self._acting
        self.stop.disabled = off or not running or self.stop in self._acting
        self.keep.disabled = not (agent and agent["has_session"])
        counts = f"{agents} of {most_agents} agents · {active} of {most_runs} runs"
        hint = ""
        if agents >= most_agents:
            counts += " · remove an agent before you create another"
        if not agent:
            hint = "Select an agent first." if agents else "Create an agent first."
        elif running:
            hint = f"{agent['id']} is running: wait for it, or stop it."
        elif active >= most_runs:
            hint = "No more runs at a time: wait for one to end, or stop one."
        self.counts.value, self.hint.value = ("", "") if off else (_small(counts), _small(hint))

    def _show_run(self, agent: JSON | None) -> None:
        run = agent and agent["last_run"]
        self.run = run["id"] if run else None
        self.steps.show(self._feed.transcript(run["id"]).items if run else [])
        if run:
            self.status.value = _run_html(run)
        elif agent:
            self.status.value = _small(f"{agent['id']} has not run yet: write what it shall do, and run it.")
        elif self._feed.workspace:
            self.status.value = _small("An agent works in a directory of its own. Give it a name and create it.")

    # --- what is done -------------------------------------------------------------------------------------------

    def _later(self, function: Callable[[], None]) -> Callable[[Any], None]:
        # A front end's messages may be handled in another thread: a subshell of the kernel.
        def later(_: Any) -> None:
            self._feed.loop.call_soon_threadsafe(function)

        return later

    def _input(self, kind: Any, placeholder: str, **layout: str) -> Any:
        # Sent when it is left: what is sent at each key could come after the click on the button.
        return kind(placeholder=placeholder, continuous_update=False, layout=Layout(**layout))

    def _button(self, text: str, icon: str, action: Callable[[], Awaitable[None]], **options: Any) -> widgets.Button:
        button = widgets.Button(description=text, icon=icon, layout=Layout(width="auto"), **options)

        async def act() -> None:
            try:
                await action()
            except AgentsError as error:
                self.error = error
            finally:
                self._acting.discard(button)
                self._feed.changed()

        def clicked() -> None:
            if button not in self._acting:
                self._acting.add(button)
                self.error = None
                self.refresh()
                self._feed.spawn(act())

        button.on_click(self._later(clicked))
        return button

    async def _create(self) -> None:
        agent = await self._feed.call(self._feed.client.create_agent, self.name.value.strip())
        self._feed.agents[agent["id"]] = agent
        self._show_agents()
        self.agents.value = agent["id"]
        self.name.value = ""

    async def _start(self) -> None:
        options = {} if self.keep.value else {"continue": False}
        await self._feed.call(self._feed.client.start_run, self.agent, self.prompt.value, **options)
        self.prompt.value = ""

    async def _stop(self) -> None:
        if self.run:
            await self._feed.call(self._feed.client.cancel, self.run)

    def _select(self) -> None:
        if self.agents.value != self.agent:
            self.error = None
            self._feed.changed()

    def _viewed(self) -> None:
        if self._view_count:
            self._feed.add(self)
        else:
            self._feed.remove(self)


class Steps(widgets.Box):
    """The end of a transcript, a widget for each step. A complete step is not drawn again, so it stays opened."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._first = 0  # number of the first item that is shown
        self._complete = 0  # how many of those shown, counted from there
        self._note = widgets.HTML()
        self._list = widgets.VBox([self._note], layout=Layout(width="100%", flex="none"))
        # Reversed, so that the browser keeps it scrolled to its end unless somebody scrolls up.
        layout = Layout(flex_flow="column-reverse", overflow="auto", max_height="420px")
        super().__init__([self._list], layout=layout)

    def show(self, items: list[Item]) -> None:
        """Show these: the same list as before with more in it, or another one."""
        note, *shown = self._list.children
        drop = 0
        if items is not self._items:
            self._items, self._first, self._complete, drop = items, 0, 0, len(shown)
        if len(items) - self._first > MOST_STEPS:
            drop = max(drop, len(items) - KEPT_STEPS - self._first)
            self._first = len(items) - KEPT_STEPS
        self._complete = max(0, self._complete - drop)
        gone, shown = shown[:drop], shown[drop:]
        for number, item in enumerate(items[self._first + self._complete :], self._complete):
            old = shown[number] if number < len(shown) else None
            step = _step(item, old)
            if step is not old:
                gone += [old] if old else []
                shown[number:] = [step, *shown[number + 1 :]]
            self._complete += number == self._complete and item.done
        note.value = _small(f"… {self._first:,} earlier steps are left out …" if self._first else "")
        self._list.children = [note, *shown]
        for step in gone:
            _close(step)


def _step(item: Item, old: widgets.Widget | None) -> widgets.Widget:
    if isinstance(old, widgets.Output):
        return old
    if isinstance(item, Text) and item.done:
        output = {"output_type": "display_data", "data": render([item]), "metadata": {}}
        return widgets.Output(outputs=(output,))
    step = old or widgets.HTML()
    if isinstance(item, Text):  # as it is written: Markdown makes sense only at its end
        text = html.escape(clean(cut(item.text, TEXT_LIMIT)))
        step.value = f'<div style="white-space: pre-wrap">{text}</div>'
    else:
        step.value = item_markdown(item)
    return step


def _in_order(widget: widgets.Widget) -> None:
    """Have what its front end says handled by the kernel's main shell.

    ipykernel 7.4 hands it to the shell, and so the thread, that the widget last spoke from. These differ from widget to
    widget, so that a click was handled before the text that had been sent before it.
    """
    widget.comm._reply_subshell_for = lambda data, default: None


def _close(widget: widgets.Widget) -> None:
    """Close it with all that it is made of."""
    for value in widget.trait_values(sync=True).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, widgets.Widget):
                _close(part)
    widgets.Widget.close(widget)


# --- words ------------------------------------------------------------------------------------------------------


def _small(text: str) -> str:
    return f'<div style="opacity: 0.75; line-height: 1.6">{html.escape(text)}</div>' if text else ""


def _notice(error: AgentsError) -> str:
    command = f"<br><code>{html.escape(error.command)}</code>" if error.command else ""
    return f'<div role="alert" style="line-height: 1.6"><b>⚠ {html.escape(error.message)}</b>{command}</div>'


def _label(agent: JSON) -> str:
    last = agent["last_run"]
    if agent["run"]:
        doing = f"… running · {shorten(agent['activity'] or '', 60)}".rstrip(" ·")
    else:
        doing = f"last run {outcome(last).partition(' · ')[0]}" if last else "no run yet"
    return f"{agent['id']}: {doing}"


def _run_html(run: JSON) -> str:
    """What was asked, and how it stands or how it ended."""
    if run["state"] == "running":
        state = f"… running for {seconds(int(time.time() - run['started']))}"
        if run["activity"]:
            state += f" · {shorten(run['activity'])}"
    else:
        state = outcome(run)
    asked = f"<b>{html.escape(run['agent'])}</b>: {html.escape(shorten(run['prompt']))}"
    # That it was cancelled needs no explanation.
    failed = _notice(AgentsError(**run["error"])) if run["error"] and run["state"] != "cancelled" else ""
    return f'<div style="line-height: 1.6">{asked}<br>{html.escape(state)}{failed}</div>'


# --- ways in ----------------------------------------------------------------------------------------------------

_feeds: WeakValueDictionary[str, Feed] = WeakValueDictionary()


def panel(client: Client | None = None) -> Panel:
    """A panel below the cell, for the agents of this kernel's server or of `client`.

    Raises `AgentsError` where there is no server, and in a terminal.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        message = "A panel needs a notebook. In a terminal, `jupyter agents --help` tells what there is."
        raise AgentsError(message, "no_notebook") from None
    client = client or Client.discover()
    return Panel(_feeds.get(client.url) or _feeds.setdefault(client.url, Feed(client, loop)))


class _Callable(types.ModuleType):
    """Python gives the package's attribute `panel` to this module, but `jupyter_agents.panel()` makes a panel."""

    def __call__(self, client: Client | None = None) -> Panel:
        return panel(client)


sys.modules[__name__].__class__ = _Callable
