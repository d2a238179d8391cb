"""`jupyter agents …`, and the verbs that it shares with the magic."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import importlib.metadata
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn, Protocol, TextIO

from .client import AgentsError, Client, RunHandle
from .transcript import Text, Transcript, clean, item_text, outcome, seconds, shorten, size, transcript

RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
PERMISSION_MODES = ("acceptEdits", "auto", "bypassPermissions", "default", "dontAsk", "plan")

Said = tuple[Any, str]  # what a verb answers: for --json, and for a person


class Parser(argparse.ArgumentParser):
    """Raises what is wrong with the arguments, where argparse would end the process."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise AgentsError(f"{message[:1].upper()}{message[1:]}; `{self.prog} --help` shows what there is.", "usage")


# --- verbs ------------------------------------------------------------------------------------------------------


def create(client: Client, args: argparse.Namespace) -> Said:
    agent = client.create_agent(args.name)
    return agent, f"Agent {agent['id']} is ready."


def list_agents(client: Client, args: argparse.Namespace) -> Said:
    agents = client.agents()
    rows = [
        (a["id"], a["activity"] or a["state"], outcome(a["last_run"]) if a["last_run"] else "no run yet")
        for a in agents
    ]
    return agents, table(rows) or "No agents yet."


def rm(client: Client, args: argparse.Namespace) -> Said:
    client.remove_agent(args.name)
    return None, f"Agent {args.name} and its files are removed."


def status(client: Client, args: argparse.Namespace) -> Said:
    workspace = client.workspace()
    if workspace["state"] == "ready" and not workspace["memory"]:
        workspace["memory"] = _sample(client)
    limits, memory = workspace["limits"], workspace["memory"]
    active = [run for run in client.runs() if run["state"] == "running"] if workspace["active_runs"] else []
    agents = "?" if workspace["agents"] is None else workspace["agents"]
    rows = [
        ("workspace", ", ".join(filter(None, (workspace["name"], workspace["state"])))),
        (
            "memory",
            memory_text(memory, limits["memory_bytes"]) if memory else f"limit {size(limits['memory_bytes'])}",
        ),
        ("agents", f"{agents} of {limits['agents']}"),
        ("runs", f"{workspace['active_runs']} of {limits['runs']}"),
        *((f"  {run['agent']}", f"{run['id']}  {_running(run)}") for run in active),
    ]
    if memory and memory["oom_kills"]:
        rows.insert(2, ("", f"{memory['oom_kills']} processes were killed for memory since it started"))
    if workspace["problem"]:
        rows.append(("problem", sentence(workspace["problem"])))
    return workspace, table(rows)


def image(client: Client, args: argparse.Namespace) -> Said:
    workspace = client.choose_image(args.image) if args.image else client.workspace()
    rows = [("*" if name == workspace["image"] else "", name) for name in workspace["images"]]
    return workspace, table(rows)


def runs(client: Client, args: argparse.Namespace) -> Said:
    found = client.runs(args.name)
    rows = [
        (
            run["id"],
            run["agent"],
            _running(run) if run["state"] == "running" else outcome(run),
            shorten(run["prompt"], 50),
        )
        for run in found
    ]
    return found, table(rows) or "No runs yet."


def log(client: Client, args: argparse.Namespace) -> Said:
    run = find_run(client, args.run)
    events = list(client.events(run["id"]))
    text = "\n".join(item_text(item) for item in transcript(events).items)
    return events, f"{text}\n{outcome(run)}"


def stop(client: Client, args: argparse.Namespace) -> Said:
    run = client.cancel(find_run(client, args.run)["id"])
    return run, f"Run {run['id']} of {run['agent']}: {outcome(run)}"


def env(client: Client, args: argparse.Namespace) -> Said:
    variables: dict[str, str | None] = dict.fromkeys(args.unset)
    for given in args.variables:
        name, equals, value = given.partition("=")
        variables[name] = value if equals else _ask(name, args.read)
    names = client.set_env(args.name, variables) if variables else client.env(args.name)
    return names, "\n".join(names) or f"Agent {args.name} has no variables."


def files(client: Client, args: argparse.Namespace) -> Said:
    entries = client.files(args.name, args.path)
    rows = [
        (
            clean(entry["name"]) + ("/" if entry["type"] == "directory" else ""),
            "" if entry["type"] == "directory" else size(entry["size"]),
            f"{datetime.fromtimestamp(entry['modified']):%Y-%m-%d %H:%M}",
        )
        for entry in entries
    ]
    return entries, table(rows) or "No files."


def get(client: Client, args: argparse.Namespace) -> Said:
    with warnings.catch_warnings(record=True) as told:  # what was left out
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning)
        path = str(client.get(args.name, args.path, args.destination))
    notes = [str(warning.message) for warning in told]
    return {"path": path, "notes": notes}, "\n".join([f"Saved as {path}", *notes])


def put(client: Client, args: argparse.Namespace) -> Said:
    path = client.put(args.name, args.source, args.path)
    return {"path": path}, f"Agent {args.name} has it as {path}"


def diff(client: Client, args: argparse.Namespace) -> Said:
    text = client.diff(args.name)
    return {"diff": text}, clean(text).rstrip("\n") or "The last run changed nothing."


def add_verbs(commands: Any) -> None:
    """Add the verbs that the magic and the command line share; each sets `verb` to what carries it out.

    The arguments need a `read(prompt)` too, for values that are asked for.
    """

    def verb(name: str, carry_out: Callable[[Client, argparse.Namespace], Said], help: str) -> Parser:
        parser: Parser = commands.add_parser(name, help=help, description=help)
        parser.set_defaults(verb=carry_out)
        return parser

    def agent(parser: Parser, **options: Any) -> None:
        parser.add_argument("name", metavar="NAME", help="the agent", **options)

    agent(verb("create", create, "make an agent"))
    verb("list", list_agents, "the agents, and what they do")
    agent(verb("rm", rm, "remove an agent with all its files"))
    verb("status", status, "memory against its cap, limits, active runs")
    verb("image", image, "the images that you may choose, the present one marked, or choose one").add_argument(
        "image", metavar="IMAGE", nargs="?", help="make the workspace anew from this one; files stay"
    )
    agent(verb("runs", runs, "runs, newest first"), nargs="?")
    for name, carry_out, help in (("log", log, "what a run did"), ("stop", stop, "cancel a run")):
        verb(name, carry_out, help).add_argument("run", metavar="RUN|NAME", help="a run, or an agent for its last one")
    parser = verb("env", env, "set variables of an agent, or list their names; values are never shown")
    agent(parser)
    parser.add_argument("variables", metavar="KEY=VALUE|KEY", nargs="*", help="a KEY alone asks for its value")
    parser.add_argument("-u", "--unset", metavar="KEY", action="append", default=[], help="remove a variable")
    parser = verb("files", files, "an agent's files")
    agent(parser)
    parser.add_argument("path", metavar="FOLDER", nargs="?", default="", help="a folder of the agent")
    parser = verb("get", get, "copy a file or folder from an agent")
    agent(parser)
    parser.add_argument("path", metavar="PATH", help="of the agent")
    parser.add_argument("destination", metavar="DEST", nargs="?", default=".", help="where to, here")
    parser = verb("put", put, "copy a file or folder to an agent")
    agent(parser)
    parser.add_argument("source", metavar="SRC", help="a file or folder, here")
    parser.add_argument("path", metavar="PATH", nargs="?", default="", help="of the agent; a folder when it ends in /")
    agent(verb("diff", diff, "what an agent's last run changed"))


def add_run_options(parser: Parser) -> None:
    """The options that a run takes, for `%%agent` and `jupyter agents run`."""
    parser.add_argument("name", metavar="NAME", help="the agent, made when there is none")
    parser.add_argument("-n", "--new", action="store_true", help="begin a new conversation")
    parser.add_argument("-b", "--background", action="store_true", help="don't wait for the end")
    parser.add_argument("-m", "--model", metavar="MODEL")
    parser.add_argument("--max-turns", metavar="N", type=int)
    parser.add_argument("--max-budget", metavar="USD", type=float)
    parser.add_argument("--permission-mode", choices=PERMISSION_MODES)
    parser.add_argument("--timeout", metavar="S", type=float, help="seconds that it may take")


def start_run(client: Client, args: argparse.Namespace, prompt: str) -> RunHandle:
    return client.start_run(
        args.name,
        prompt,
        model=args.model,
        max_turns=args.max_turns,
        max_budget_usd=args.max_budget,
        permission_mode=args.permission_mode,
        timeout=args.timeout,
        **({"continue": False} if args.new else {}),
    )


def ensure_agent(client: Client, name: str) -> None:
    """Create the agent when it does not exist."""
    try:
        client.create_agent(name)
    except AgentsError as error:
        if error.reason != "agent_exists":
            raise


def find_run(client: Client, name: str) -> dict[str, Any]:
    """A run by its id, or an agent's last one."""
    if RUN_ID.fullmatch(name):
        return client.run(name)
    last = client.agent(name)["last_run"]
    if not last:
        raise AgentsError(f"Agent {name} has not run yet.", "unknown_run")
    return dict(last)


def _ask(name: str, read: Callable[[str], str]) -> str:
    try:
        return read(f"{name}: ")
    except Exception as error:  # ipykernel has an exception of its own for a front end that can't ask
        raise AgentsError(f"Nobody can be asked for {name} here: give it as {name}=VALUE.", "no_input") from error


def _read(prompt: str) -> str:
    return getpass.getpass(prompt) if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")


def _sample(client: Client) -> dict[str, Any] | None:
    """Memory is only measured while somebody watches: watch for a moment."""
    deadline = time.monotonic() + 4
    for message in client.watch():
        if message and message["type"] == "memory":
            return dict(message["memory"])
        if time.monotonic() > deadline:
            break
    return None


# --- words ------------------------------------------------------------------------------------------------------


def say(text: str, out: TextIO | None = None) -> None:
    (out or sys.stdout).write(text + "\n")


def table(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def sentence(error: dict[str, Any] | AgentsError) -> str:
    """What is wrong, and below it the command that mends it."""
    body = error if isinstance(error, dict) else vars(error)
    return str(body["message"]) + (f"\n    {body['command']}" if body.get("command") else "")


def memory_text(memory: dict[str, Any], limit: int) -> str:
    level = "" if memory["level"] == "ok" else f" ({memory['level']})"
    return f"{size(memory['used_bytes'])} of {size(limit)}{level}"


def _running(run: dict[str, Any]) -> str:
    return " · ".join(filter(None, (f"running for {seconds(time.time() - run['started'])}", run["activity"])))


# --- following a run --------------------------------------------------------------------------------------------


class View(Protocol):
    """Where a run is shown while it goes on."""

    def show(self, transcript: Transcript, memory: str) -> None:
        """Called with each change, and several times a second without one."""

    def finish(self, transcript: Transcript, run: RunHandle) -> None: ...


class TerminalView:
    """Writes a run down as it goes on; nothing that was written changes."""

    def __init__(self, out: TextIO):
        self._out = out
        self._items = 0  # written completely
        self._characters = 0  # written of the item after them

    def show(self, transcript: Transcript, memory: str) -> None:
        new = ""
        for item in transcript.items[self._items :]:
            text = clean(item.text).rstrip("\n") if isinstance(item, Text) else item_text(item)
            new += text[self._characters :]
            self._characters = len(text)
            if isinstance(item, Text) and not item.done:
                break
            new += "\n"
            self._items += 1
            self._characters = 0
        # At once, and after it was counted: an interrupt in between must not have it written twice.
        self._out.write(new)
        self._out.flush()

    def finish(self, transcript: Transcript, run: RunHandle) -> None:
        self.show(transcript, "")
        self._out.write(("\n" if self._characters else "") + outcome(run.info) + "\n")


def follow(run: RunHandle, view: View) -> RunHandle:
    """Show a run until it ends. An interrupt cancels it."""
    shown = Transcript()
    memory = ""
    limit = 0
    try:
        for message in run.client.watch(run.id):
            kind = message and message["type"]
            if message and kind == "events":
                for event in message["events"]:
                    shown.feed(event)
            elif message and kind == "state":
                limit = message["workspace"]["limits"]["memory_bytes"]
            elif message and kind == "memory":
                memory = memory_text(message["memory"], limit or message["memory"]["limit_bytes"])
            elif message and kind == "error" and message.get("run") == run.id:
                raise AgentsError(message["message"], message["reason"])
            view.show(shown, memory)
        run.refresh()
    except KeyboardInterrupt:
        run.cancel()
    view.finish(shown, run)
    return run


# --- what only the command line has -----------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise AgentsError("The prompt is empty: say what the agent shall do.", "empty_prompt")
    client = Client.discover(any_server=True)
    ensure_agent(client, args.name)
    run = start_run(client, args, prompt)
    if not args.background:
        follow(run, TerminalView(sys.stderr if args.json else sys.stdout))
    if args.json:
        say(json.dumps(run.info))
    elif args.background:
        say(run.id)
    if run.info["state"] == "cancelled":
        return 130
    run.check()
    return 0


def _build(args: argparse.Namespace) -> int:
    import docker

    from .docker_engine import DockerEngine
    from .errors import Unavailable
    from .image.build import BASE, build

    engine = DockerEngine()
    try:
        with contextlib.closing(docker.from_env()) as client:
            build(
                client,
                args.tag or engine.image,
                args.base or BASE,
                args.ca_bundle or engine.ca_bundle,
                log=lambda line: say(line, sys.stderr),
            )
    except Unavailable as error:
        raise AgentsError(**error.to_dict()) from error
    except docker.errors.DockerException as error:
        raise AgentsError(
            f"The Docker engine doesn't do it: start it, or see what it says ({error}).", "engine_unavailable"
        ) from error
    return 0


def check_versions() -> str:
    names = ("jupyter_agents", "jupyter_server", "ipykernel", "docker")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            raise AgentsError(f"{name} is not installed.", "missing", f"pip install {name}") from None
    return ", ".join(found)


def check_engine() -> str:
    """Engine and image, as the server sees them: with its configuration, and on a Hub the Hub's."""
    workspace = Client.discover(any_server=True).workspace()
    if workspace["problem"]:
        raise AgentsError(**workspace["problem"])
    return f"the workspace is {workspace['state']}, with {size(workspace['limits']['memory_bytes'])} of memory"


def check_key() -> str:
    for name in (
        "ANTHROPIC_API_KEY",
        "CLAUDE_CODE_OAUTH_TOKEN",
        "ANTHROPIC_AUTH_TOKEN",
        "ANTHROPIC_BASE_URL",
    ):
        if os.environ.get(name):
            return f"{name} is set here"
    raise AgentsError(
        "No key for Claude is set here: start the server with ANTHROPIC_API_KEY or CLAUDE_CODE_OAUTH_TOKEN in its "
        "environment, or give an agent its own with `jupyter agents env`.",
        "no_key",
        "export ANTHROPIC_API_KEY=…",
    )


CHECKS = {"versions": check_versions, "engine and image": check_engine, "key": check_key}


def _doctor(args: argparse.Namespace) -> int:
    report = []
    for name, check in CHECKS.items():
        try:
            report.append({"check": name, "ok": True, "message": check()})
        except AgentsError as error:
            report.append({"check": name, "ok": False, "message": error.message, "command": error.command})
    if args.json:
        say(json.dumps(report))
    else:
        for entry in report:
            say(f"{'✓' if entry['ok'] else '✗'} {entry['check']}: {sentence(entry)}")
    return 0 if all(entry["ok"] for entry in report) else 1


def _verb(args: argparse.Namespace) -> int:
    value, text = args.verb(Client.discover(any_server=True), args)
    say(json.dumps(value) if args.json else text)
    return 0


def parser() -> Parser:
    made = Parser(prog="jupyter agents", description="Claude agents in one capped container.")
    made.set_defaults(command=_verb, read=_read)
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    add_verbs(commands)
    run = commands.add_parser("run", help="give an agent a prompt, and show what it does")
    add_run_options(run)
    run.add_argument("prompt", metavar="PROMPT", nargs="?", default="-", help="by default what stdin holds")
    run.set_defaults(command=_run)
    build = commands.add_parser("build", help="build the image of the workspaces")
    build.add_argument("--tag", help="by default the one that the server uses by default")
    build.add_argument("--base", help="image to build upon, with apt")
    build.add_argument("--ca-bundle", help="PEM file to trust while building")
    build.set_defaults(command=_build)
    commands.add_parser("hub", help="on a JupyterHub: be the service, or list, stop and delete workspaces")
    doctor = commands.add_parser("doctor", help="look whether all is well, and say how to mend what is not")
    doctor.set_defaults(command=_doctor)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="answer in JSON")
    return made


def main(argv: list[str] | None = None) -> int:
    """The console script; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["hub"]:  # its arguments are a traitlets application's
        from .hub.cli import main as hub

        return hub(argv[1:])
    try:
        args = parser().parse_args(argv)
        return int(args.command(args))
    except AgentsError as error:
        say(sentence(error), sys.stderr)
        return 2 if error.reason == "usage" else 1
    except OSError as error:
        say(f"{error.filename or 'Error'}: {error.strerror or error}.", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
