"""`make bench`: what ours takes over the floor, the two measured in turn in the same run, as a Markdown table.

A new comparison is a function that takes a `Bench` and yields rows, and a place in `COMPARISONS`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import requests
from floor import Floor, until
from server import Server
from table import MB, Row, in_turn, markdown
from traitlets.config import Config

from jupyter_agents.docker_engine import DockerEngine
from jupyter_agents.workspace import Workspace
from jupyter_agents.workspaces import Workspaces

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from demo import model_addresses  # noqa: E402 - found by the line before

T = TypeVar("T")
USER = "served"  # whose workspace the server has; those of all others are used without it


class Bench:
    """What the comparisons share. `quick`: all of it once and small, to see that it works."""

    def __init__(self, quick: bool):
        self.quick = quick
        self.agents = 2 if quick else 10
        config = {
            "DockerEngine": {"deployment": f"bench-{secrets.token_hex(4)}"},
            "Workspaces": {"max_agents": 100},
        }
        self.workspaces = Workspaces(config=Config(config))
        engine = self.workspaces.engine
        assert isinstance(engine, DockerEngine)
        self.floor = Floor(engine)
        self._loop = asyncio.new_event_loop()
        with ExitStack() as opened:
            opened.callback(self.floor.remove_all)
            opened.callback(self._loop.close)
            opened.callback(lambda: self.do(self.workspaces.stop()))
            self.plain = opened.enter_context(closing(Server(False)))
            self.server = opened.enter_context(closing(Server(True, {**config, "JupyterAgents": {"user": USER}})))
            self.close = opened.pop_all().close
        self.client = self.server.client

    def times(self, many: int) -> int:
        return 1 if self.quick else many

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    def workspace(self) -> Workspace:
        """That of a new user."""
        return self.workspaces.get(f"user-{secrets.token_hex(4)}")

    def served(self) -> str:
        """The container of the server's user, with a directory for the floor in it."""
        self.client.start_workspace()
        container = self.floor.container_of(USER)
        self.floor.put_agent(container)
        return container


# --- the comparisons ------------------------------------------------------------------------------------------------

IMPORTS = """
import time
begun = time.perf_counter()
import jupyter_server.serverapp
between = time.perf_counter()
import jupyter_agents.app
print(between - begun, time.perf_counter() - between)
"""


def imports(bench: Bench) -> Iterator[Row]:
    command = [sys.executable, "-c", IMPORTS]
    told = [subprocess.check_output(command).split() for _ in range(bench.times(7))]
    ours, floor = [float(ours) for _, ours in told], [float(floor) for floor, _ in told]
    yield Row("Import of the extension, over that of jupyter_server", ours, floor)


def idle_server(bench: Bench) -> Iterator[Row]:
    yield _memory(bench, "Memory of a Jupyter server with the extension, over one without, idle")


def used_server(bench: Bench) -> Iterator[Row]:
    yield _memory(bench, "The same after all the use in this table")


def _memory(bench: Bench, what: str) -> Row:
    return Row(what, [bench.server.resident_bytes()], [bench.plain.resident_bytes()], "+25 MB", "MB")


def starting(bench: Bench) -> Iterator[Row]:
    pattern = bench.served()
    users: list[Workspace] = []

    def connect() -> None:
        users.append(bench.workspace())
        bench.do(users[-1].connect())

    def raw() -> None:
        bench.floor.start_like(pattern)

    def come_back() -> float:
        user = users.pop()
        bench.do(user.create_agent("a"))
        bench.do(user.stop())
        begun = time.perf_counter()
        bench.do(user.connect())
        return time.perf_counter() - begun

    ours, floor = in_turn(bench.times(9), connect, raw)
    yield Row("Workspace ready for a new user, over raw create + start", ours, floor, "1.2")
    ours, floor = in_turn(bench.times(5), come_back, raw)
    yield Row("Workspace ready again, with an agent in it, over the same", ours, floor)


def creating(bench: Bench) -> Iterator[Row]:
    container, workspace = bench.served(), bench.workspace()
    bench.do(workspace.connect())
    names = (f"a{number}" for number in range(1000))

    def serve() -> None:
        bench.client.create_agent(next(names))

    def create() -> None:
        bench.do(workspace.create_agent(next(names)))

    def raw() -> None:
        bench.floor.put_agent(container)

    served, direct, floor = in_turn(bench.times(15), serve, create, raw)
    yield Row("Creating an agent over HTTP, over one raw put_archive", served, floor)
    yield Row("Creating an agent directly, over the same", direct, floor)


def running(bench: Bench) -> Iterator[Row]:
    container, client, prompt = bench.served(), bench.client, "[[say hello]]"
    client.create_agent("runner")

    def run() -> float:
        begun = time.perf_counter()
        handle = client.start_run("runner", prompt, **{"continue": False})
        events = handle.events(follow=True)
        next(events)
        spent = time.perf_counter() - begun
        for _ in events:
            pass
        handle.refresh().check()
        return spent

    def raw() -> float:
        begun = time.perf_counter()
        output = bench.floor.claude(container, prompt)
        until(b"\n", output)
        spent = time.perf_counter() - begun
        for _ in output:
            pass
        return spent

    if not bench.quick:
        in_turn(1, run, raw)  # Claude's first run in a directory sets that up
    ours, floor = in_turn(bench.times(13), run, raw)
    yield Row("Start of a run to Claude's first event, over `docker exec claude`", ours, floor, "1.15")


def streaming(bench: Bench) -> Iterator[Row]:
    """The log is a run's own, over and over: its lines are as long and as mixed as Claude's."""
    container, client = bench.served(), bench.client
    client.create_agent("streamer")
    run = client.start_run("streamer", "[[events 2000]]").wait().check()
    url = f"{client.url}jupyter-agents/runs/{run.id}/events"
    *events, end = requests.get(url, headers=client.headers, timeout=60).content.splitlines(keepends=True)
    log = b"".join(events)
    size = (2 if bench.quick else 50) * MB
    path = f".agent/runs/{run.id}/events.jsonl"
    client.put("streamer", log * (size // len(log) + 1) + end, path)
    owner = bench.floor.owner(container, "/workspace/agent-streamer")

    def serve() -> None:
        with requests.get(url, headers=client.headers, stream=True, timeout=60) as answer:
            receive(answer.iter_content(MB))

    def raw() -> None:
        receive(bench.floor.exec(container, ["cat", f"/workspace/agent-streamer/{path}"], owner))

    def receive(pieces: Iterable[bytes]) -> None:
        if sum(map(len, pieces)) < size:
            raise RuntimeError("Not all events came.")

    ours, floor = in_turn(bench.times(5), serve, raw)
    yield Row(f"Streaming {size // MB} MB of events over HTTP, over `docker exec cat`", ours, floor)


def ten_agents(bench: Bench) -> Iterator[Row]:
    """Also beside the design that this one replaces: a container for each agent."""
    floor, pattern, names = bench.floor, bench.served(), [f"a{number}" for number in range(bench.agents)]
    prompt, tool = "[[sleep 60]]", b'"input":{"command"'

    def together() -> dict[str, float]:
        workspace = bench.workspace()
        begun = time.perf_counter()
        container = bench.do(workspace.connect()).id
        made = time.perf_counter() - begun
        found = {"empty": floor.memory([container]), "empty processes": floor.processes(container)}
        begun = time.perf_counter()
        for name in names:
            bench.do(workspace.create_agent(name))
        found |= {"made": made + time.perf_counter() - begun}
        found |= {"idle": floor.memory([container]), "processes": floor.processes(container)}
        begun = time.perf_counter()
        runs = [bench.do(workspace.start_run(name, {"prompt": prompt})) for name in names[:3]]
        while not all((run.activity or "").startswith("Bash") for run in runs):
            bench.do(asyncio.sleep(0.02))
        found |= {"tool": time.perf_counter() - begun, "running": floor.memory([container])}
        bench.do(workspace.stop(volume=True))
        return found

    def apart() -> dict[str, float]:
        begun = time.perf_counter()
        containers = [floor.start_like(pattern) for _ in names]
        found = {"made": time.perf_counter() - begun, "idle": floor.memory(containers)}
        for container in containers[:3]:
            floor.put_agent(container)
        begun = time.perf_counter()
        for output in [floor.claude(container, prompt) for container in containers[:3]]:
            until(tool, output)
        found |= {"tool": time.perf_counter() - begun, "running": floor.memory(containers)}
        floor.remove(containers)
        return found

    ours, each = zip(*((together(), apart()) for _ in range(bench.times(2))), strict=True)

    def row(what: str, side: Iterable[dict[str, float]], figure: str, over: str, **options: str) -> Row:
        return Row(f"{len(names)} {what}", [one[figure] for one in ours], [one[over] for one in side], **options)

    yield row("idle agents, over a workspace without any: processes", ours, "processes", "empty processes", unit="")
    yield row("idle agents, over a workspace without any: memory", ours, "idle", "empty", unit="MB")
    yield row("agents, over a container for each: time to make them", each, "made", "made")
    yield row("agents, over a container for each: memory, idle", each, "idle", "idle", unit="MB")
    yield row("agents, over a container for each: memory, 3 of them running", each, "running", "running", unit="MB")
    yield row("agents, over a container for each: until 3 started at once use a tool", each, "tool", "tool")


COMPARISONS: list[Callable[[Bench], Iterator[Row]]] = [
    imports,
    idle_server,
    starting,
    creating,
    running,
    streaming,
    ten_agents,
    used_server,
]


@contextmanager
def scripted_model() -> Iterator[None]:
    """The model is the demo's, without delays, so that what differs is not the model."""
    hosts, name = model_addresses()
    command = [sys.executable, str(ROOT / "demo" / "scripted_model.py"), "--delay=0", "--host", *hosts]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            port = process.stdout.readline().strip().rpartition(":")[2]
            os.environ |= {
                "ANTHROPIC_BASE_URL": f"http://{name}:{port}",
                "ANTHROPIC_API_KEY": "scripted",
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            }
            yield
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="everything once and small, to see that it works")
    names = [comparison.__name__ for comparison in COMPARISONS]
    parser.add_argument("only", nargs="*", metavar="COMPARISON", help=f"some of them: {', '.join(names)}")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed then too
    rows: list[Row] = []
    load = os.getloadavg()[0]
    with scripted_model(), closing(Bench(options.quick)) as bench:
        for comparison in COMPARISONS:
            if comparison.__name__ in (options.only or names):
                print(comparison.__name__, file=sys.stderr, flush=True)
                rows += comparison(bench)
    print(markdown(rows))
    print(f"\nMedians, on {os.cpu_count()} CPUs; load average at the start: {load:.1f}.")


if __name__ == "__main__":
    main()
