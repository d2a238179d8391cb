"""`%agent` and `%%agent`: agents from notebook cells and IPython terminals."""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from IPython.core.error import TryNext
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand
from IPython.display import display

from . import cli
from .client import AgentsError, Client, RunHandle
from .transcript import Item, Text, Transcript, clean, fenced, outcome, render, seconds, size, transcript

HELP = """\
%%agent NAME [options]    the rest of the cell is the prompt; %%agent --help tells the options
%agent panel              agents, memory and a prompt in a panel below the cell
"""
UPDATE_SECONDS = 0.2
PAGE_ITEMS = 20
PAGE_SIZE = 12_000
PAGES = 20  # below the 50 outputs of a cell that JupyterLab shows


def load_ipython_extension(ipython: Any) -> None:
    """Register the magics and their completion."""
    magics = AgentMagics(ipython)
    ipython.register_magics(magics)
    for name in ("%agent", "%%agent"):
        ipython.set_hook("complete_command", magics.complete, str_key=name)


@magics_class
class AgentMagics(Magics):
    """The server is looked for at the first use."""

    client: Client | None = None
    shell: Any  # never None once it is made

    @no_var_expand  # an agent's variables may hold braces and dollars
    @line_cell_magic
    def agent(self, line: str, cell: str | None = None) -> Any:
        """Make, run and look after Claude agents; `%agent` alone shows how."""
        try:
            return self._command(line) if cell is None else self._prompt(line, cell)
        except SystemExit:  # argparse has shown the help that was asked for
            return None
        except KeyboardInterrupt:
            raise AgentsError("Interrupted.", "interrupted") from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise AgentsError(f"{where}{error.strerror or error}.", "os_error") from None

    # --- %agent -------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> Any:
        words = _split(line)
        if not words or words[0] in ("help", "-h", "--help"):
            cli.say(f"{_command_parser().format_help()}\n{HELP}")
            return None
        if words[0] == "panel":
            from .panel import panel

            return panel()
        if words[0] not in _verbs():
            raise AgentsError(
                f"%agent doesn't know {words[0]!r}; `%agent help` shows what it knows. To give a prompt to an agent, "
                f"write %%agent {words[0]} with the prompt below it.",
                "usage",
            )
        if words[0] != "env":
            words = _split(self._expand(line))
        args = _command_parser().parse_args(words)
        value, text = args.verb(self._client(), args)
        if args.verb is cli.log and self._notebook():
            items = transcript(value).items
            shown = items[-PAGES * PAGE_ITEMS :]
            for start in range(0, len(shown), PAGE_ITEMS):
                left_out = len(items) - len(shown) if start == 0 else 0
                _Output(render(shown[start : start + PAGE_ITEMS], left_out))
            cli.say(text.splitlines()[-1])
        elif args.verb is cli.diff and value["diff"] and self._notebook():
            _Output({"text/markdown": fenced(clean(value["diff"]), "diff"), "text/plain": text})
        else:
            cli.say(text)
        return None

    # --- %%agent ------------------------------------------------------------------------------------------------

    def _prompt(self, line: str, cell: str) -> RunHandle:
        args = _prompt_parser().parse_args(_split(self._expand(line)))
        if not cell.strip():
            raise AgentsError("The prompt is empty: write below %%agent what the agent shall do.", "empty_prompt")
        if args.output and not args.output.isidentifier():
            raise AgentsError(f"-o {args.output}: that is not the name of a variable.", "usage")
        inputs = [variable_file(name, self._variable(name)) for name in args.input]
        client = self._client()
        cli.ensure_agent(client, args.name)
        for _, source, path in inputs:
            client.put(args.name, source, path)
        prompt = cell.rstrip("\n")
        if inputs:
            prompt += "\n\nThese files, relative to your working directory, hold what the user gave you:\n"
            prompt += "\n".join(f"- {path}: {about}" for about, _, path in inputs)
        run = self._start(client, args, prompt)
        if args.output:
            self.shell.user_ns[args.output] = run
        if args.background:
            return run
        return cli.follow(run, CellView(run) if self._notebook() else cli.TerminalView(sys.stdout)).check()

    def _start(self, client: Client, args: Any, prompt: str) -> RunHandle:
        try:
            return cli.start_run(client, args, prompt)
        except KeyboardInterrupt:
            # It may have been started all the same, with an answer that did not get here.
            run = client.agent(args.name)["last_run"]
            if run and run["state"] == "running" and prompt.startswith(run["prompt"]):
                client.cancel(run["id"])
            raise

    def _variable(self, name: str) -> Any:
        try:
            return self.shell.user_ns[name]
        except KeyError:
            raise AgentsError(f"-i {name}: there is no variable of that name.", "usage") from None

    # --- both ---------------------------------------------------------------------------------------------------

    def _client(self) -> Client:
        if self.client is None:
            self.client = Client.discover()
        return self.client

    def _notebook(self) -> bool:
        return hasattr(self.shell, "kernel")

    def _expand(self, line: str) -> str:
        # {name} and $name as in other magics, but with the notebook's variables only: none of these frames'.
        return str(self.shell.var_expand(line, depth=sys.getrecursionlimit()))

    def complete(self, shell: Any, event: Any) -> list[str]:
        """Candidates for the word at the cursor: subcommands, options, agents."""
        before = event.text_until_cursor.split()
        if not before or before[0] not in ("%agent", "%%agent"):
            raise TryNext
        if not event.text_until_cursor[-1:].isspace():
            before.pop()
        if not before:
            raise TryNext
        cell = before[0] == "%%agent"
        if not cell and len(before) == 1:
            return sorted([*_verbs(), "help", "panel"])
        if cell and before[-1] in ("-i", "--input", "-o", "--output"):
            return [name for name in shell.user_ns if not name.startswith("_")]
        parser = _prompt_parser() if cell else _verbs().get(before[1])
        if parser is None:
            return []
        options = sorted(option for option in parser._option_string_actions if option.startswith("--"))
        named = [word for word in before[1 if cell else 2 :] if not word.startswith("-")]
        return options if named and not cell else self._agents() + options

    def _agents(self) -> list[str]:
        # Completion must not start a server.
        with contextlib.suppress(AgentsError):
            return [agent["id"] for agent in self.client.agents()] if self.client else []
        return []


# --- arguments --------------------------------------------------------------------------------------------------


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise AgentsError(f"{error} in {line.strip()!r}; quote or escape it.", "usage") from None


def _command_parser() -> cli.Parser:
    parser = cli.Parser(prog="%agent")
    parser.set_defaults(read=getpass.getpass)
    cli.add_verbs(parser.add_subparsers(metavar="COMMAND", required=True))
    return parser


def _verbs() -> dict[str, cli.Parser]:
    verbs = cli.Parser(prog="%agent").add_subparsers()
    cli.add_verbs(verbs)
    return dict(verbs.choices)


def _prompt_parser() -> cli.Parser:
    parser = cli.Parser(prog="%%agent", description="Give an agent the rest of the cell as its prompt.")
    cli.add_run_options(parser)
    parser.add_argument(
        "-i", "--input", metavar="VAR", action="append", default=[], help="give it a variable, as a file"
    )
    parser.add_argument("-o", "--output", metavar="VAR", help="bind the result to this variable")
    return parser


# --- variables as files -----------------------------------------------------------------------------------------


def variable_file(name: str, value: Any) -> tuple[str, Path | bytes, str]:
    """A variable in its natural form: what it is, its content, and the path to put it at in the agent's directory."""
    if isinstance(value, Path):
        if not value.exists():
            raise AgentsError(f"-i {name}: there is no file {value}.", "usage")
        return f"the {'folder' if value.is_dir() else 'file'} `{name}`", value, f"inputs/{value.resolve().name}"
    about, data, suffix = _content(name, value)
    return f"`{name}`, {about}", data, f"inputs/{name}.{suffix}"


def _content(name: str, value: Any) -> tuple[str, bytes, str]:
    # What was not imported can't be the type of anything, and stays so.
    numpy, pandas = sys.modules.get("numpy"), sys.modules.get("pandas")
    if isinstance(value, str):
        return "a text", value.encode("utf-8", "surrogatepass"), "txt"
    if isinstance(value, (bytes, bytearray)):
        return "bytes", bytes(value), "bin"
    if pandas and isinstance(value, pandas.Series):
        value = value.to_frame()
    if pandas and isinstance(value, pandas.DataFrame):
        return _data_frame(value)
    if numpy and isinstance(value, numpy.ndarray):
        file = io.BytesIO()
        try:
            numpy.save(file, value, allow_pickle=False)
        except ValueError as error:
            raise AgentsError(f"-i {name}: an array of Python objects can't be given.", "usage") from error
        return f"a numpy array of shape {value.shape} and type {value.dtype}", file.getvalue(), "npy"
    if value is None or isinstance(value, (dict, list, tuple, bool, int, float)):
        try:
            return "as JSON", json.dumps(value, ensure_ascii=False, indent=1).encode(), "json"
        except (TypeError, ValueError) as error:
            raise AgentsError(f"-i {name}: it can't be written as JSON ({error}).", "usage") from error
    raise AgentsError(
        f"-i {name}: a {type(value).__name__} can't be given to an agent; str, dict, list, DataFrame, ndarray, bytes "
        "and Path can.",
        "usage",
    )


def _data_frame(frame: Any) -> tuple[str, bytes, str]:
    about = f"a pandas DataFrame of {frame.shape[0]} rows and {frame.shape[1]} columns"
    try:
        return f"{about}, as Parquet", frame.to_parquet(), "parquet"
    except (ImportError, TypeError, ValueError, OverflowError):
        pass  # no pyarrow, or columns that Parquet can't hold
    except Exception as error:
        if not type(error).__module__.startswith("pyarrow"):
            raise
    return f"{about}, as CSV with its index", frame.to_csv().encode(), "csv"


# --- the cell's output ------------------------------------------------------------------------------------------


class CellView:
    """A run in a cell: one line about its state, then what it does, in pages.

    Only pages that changed are sent again. So long output stays cheap, and calls that the reader opened stay open.
    """

    def __init__(self, run: RunHandle):
        self._run = run
        self._began = self._updated = time.monotonic()
        self._head = _Output(_head(run.agent, "… starting"))
        self._pages: list[_Output] = []
        self._starts = [0]  # number of each page's first item

    def show(self, transcript: Transcript, memory: str) -> None:
        now = time.monotonic()
        if now - self._updated > UPDATE_SECONDS:
            self._update(transcript)
            running = f"… running for {seconds(int(now - self._began))}"
            self._head.set(_head(self._run.agent, " · ".join(filter(None, (running, memory)))))
            # Counted from the end of the update, so that slow ones leave time between them.
            self._updated = time.monotonic()

    def finish(self, transcript: Transcript, run: RunHandle) -> None:
        self._update(transcript)
        peak = run.info["peak_bytes"]
        text = outcome(run.info) + (f" · peak {size(peak)}" if peak else "")
        self._head.set(_head(run.agent, text))

    def _update(self, transcript: Transcript) -> None:
        items = transcript.items
        while len(self._starts) < PAGES:
            following = self._starts[-1] + _count(items[self._starts[-1] :])
            if following >= len(items):
                break
            self._starts.append(following)
        for number, first in enumerate(self._starts):
            last = self._starts[number + 1] if number + 1 < len(self._starts) else len(items)
            left_out = max(0, last - first - PAGE_ITEMS)
            if number == len(self._pages):
                self._pages.append(_Output(render(items[first + left_out : last], left_out)))
            elif not self._pages[number].settled:
                self._pages[number].set(render(items[first + left_out : last], left_out))
            self._pages[number].settled = last < len(items) and all(item.done for item in items[first:last])


class _Output:
    """An output of the cell that can be replaced."""

    def __init__(self, bundle: dict[str, str]):
        self._bundle = bundle
        self._handle: Any = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        self.settled = False

    def set(self, bundle: dict[str, str]) -> None:
        if bundle != self._bundle:
            self._bundle = bundle
            self._handle.update(bundle, raw=True)


def _count(items: list[Item]) -> int:
    """How many of these items go on a page."""
    total = 0
    for count, item in enumerate(items[:PAGE_ITEMS]):
        total += len(item.text) if isinstance(item, Text) else len(item.input) + len(item.result or "")
        if total > PAGE_SIZE and count:
            return count
    return min(len(items), PAGE_ITEMS)


def _head(agent: str, text: str) -> dict[str, str]:
    return {"text/markdown": f"**{agent}** {text}".replace("$", "&#36;"), "text/plain": f"{agent}: {text}"}
