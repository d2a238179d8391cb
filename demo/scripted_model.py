"""A small scripted stand-in for Anthropic's Messages API, for the demo and the tests.

The real Claude Code CLI talks to it through ANTHROPIC_BASE_URL. What the "model" does is chosen by the prompt:
`[[name argument…]]` in it runs the script of that name (several run one after another), a prompt without one is
answered by the first demo script that a word in it calls for.

A script is a generator. It yields a list of blocks, the model's turn, and is sent the results of the tools that the
turn used, as text. It holds no state: each request replays it over the conversation so far, as the real API does.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

MODEL = "scripted"


@dataclass
class Text:
    """Text, streamed in deltas of `size` characters with `delay` seconds before each (None: the server's)."""

    text: str
    size: int = 24
    delay: float | None = None


class Tool:
    """One use of a tool of Claude Code."""

    def __init__(self, tool: str, **arguments: Any) -> None:
        self.tool = tool
        self.arguments = arguments


@dataclass
class Error:
    """The whole answer is an API error. `retry` says whether the CLI may try again, which takes it minutes."""

    status: int
    message: str
    retry: bool = False


class Close:
    """The connection is closed in the middle of the answer."""


class Hang:
    """The answer goes on for ever, with nothing more in it."""


Block = Text | Tool | Error | Close | Hang
Script = Generator[list[Block], str, None]


@dataclass
class Chat:
    """What a request tells: the user's prompts so far, and the tool results since the last one, a text per turn."""

    prompts: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        return self.prompts[-1] if self.prompts else ""


ADDED_BY_CLI = ("<system-reminder>", "[Request interrupted", "Continue from where you left off.")


def read_chat(messages: list[dict[str, Any]]) -> Chat:
    """Tell prompts from what the CLI adds to the user's side: tool results, reminders, notes on interruptions."""
    chat = Chat()
    for message in messages:
        if message["role"] != "user":
            continue
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        results = [_result_text(block) for block in blocks if block["type"] == "tool_result"]
        if results:
            chat.results.append("\n".join(results))
        for block in blocks:
            text = block.get("text", "")
            if block["type"] == "text" and not text.startswith(ADDED_BY_CLI):
                chat.prompts.append(text)
                chat.results.clear()
    return chat


def _result_text(block: dict[str, Any]) -> str:
    content = block.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


# --- scripts for tests: [[name argument…]] --------------------------------------------------------------------------


def bash(command: str) -> Tool:
    return Tool("Bash", command=command, description=command[:60], timeout=600_000)


def say(chat: Chat, *words: str) -> Script:
    """Answer with these words."""
    yield [Text(" ".join(words))]


def run(chat: Chat, *words: str) -> Script:
    """Run a shell command and answer with its output."""
    result = yield [bash(" ".join(words))]
    yield [Text(f"```\n{result}\n```\n")]


def write(chat: Chat, path: str, *words: str) -> Script:
    """Write a file."""
    yield [Tool("Write", file_path=path, content=" ".join(words) + "\n")]
    yield [Text(f"I wrote `{path}`.\n")]


def read(chat: Chat, path: str) -> Script:
    """Read a file and answer with what the tool said."""
    result = yield [Tool("Read", file_path=path)]
    yield [Text(f"```\n{result}\n```\n")]


def slow(chat: Chat, count: str = "20", delay: str = "0.5") -> Script:
    """Say `count` words, one each `delay` seconds."""
    yield [Text("".join(f"word{n:03d} " for n in range(int(count))), size=8, delay=float(delay))]


def sleep(chat: Chat, seconds: str = "60") -> Script:
    """Run a command that takes that long."""
    return run(chat, f"echo started; python3 -c 'import time; time.sleep({float(seconds)})'; echo woke up")


def allocate(chat: Chat, megabytes: str, seconds: str = "5") -> Script:
    """Run a command that holds that much memory for that long."""
    return run(chat, f"python3 -c 'import time; held = b\"x\" * ({megabytes} << 20); time.sleep({seconds})'")


def orphan(chat: Chat, seconds: str = "300") -> Script:
    """Leave a child in a session of its own, which holds its inherited output open."""
    return run(chat, f"setsid sleep {seconds} & echo left")


def env(chat: Chat) -> Script:
    """Answer with the environment of the tools."""
    return run(chat, "env | sort")


def hostile(chat: Chat) -> Script:
    """Answer with what must come out escaped."""
    # In base64, since the CLI refuses a command that holds control characters.
    yield [Text(HOSTILE), bash(f"echo {base64.b64encode(HOSTILE.encode()).decode()} | base64 -d")]
    yield [Text(HOSTILE)]


def big(chat: Chat, megabytes: str = "5") -> Script:
    """Answer with that much text, in one delta."""
    text = "All work and no play. \n" * (int(float(megabytes) * (1 << 20)) // 23)
    yield [Text(text, size=len(text), delay=0)]


def events(chat: Chat, count: str = "10000") -> Script:
    """Answer in that many deltas, as fast as can be."""
    yield [Text("".join(f"{n:07d} " for n in range(int(count))), size=8, delay=0)]


def error(chat: Chat, status: str, *options: str) -> Script:
    """Answer with an API error; `retry` after the status lets the CLI try again."""
    message = {"401": "invalid x-api-key", "429": "This request would exceed your rate limit", "529": "Overloaded"}
    yield [Error(int(status), message.get(status, "scripted error"), "retry" in options)]


def close(chat: Chat) -> Script:
    """Drop the connection in the middle of an answer."""
    yield [Text("This sentence is cut"), Close()]


def hang(chat: Chat) -> Script:
    """Begin to answer and never end."""
    yield [Text("And then …"), Hang()]


def digest(chat: Chat) -> Script:
    """Answer with the length in characters and the SHA-256 of the prompt as it arrived."""
    yield [Text(f"{len(chat.prompt)} {hashlib.sha256(chat.prompt.encode()).hexdigest()}")]


def recall(chat: Chat) -> Script:
    """Answer with the first prompt of the conversation, which shows that the session was continued."""
    if len(chat.prompts) > 1:
        yield [Text(f"Your first prompt was:\n\n> {chat.prompts[0]}\n\nThis is prompt {len(chat.prompts)}.\n")]
    else:
        yield [Text("This is the first prompt of our conversation.\n")]


HOSTILE = (
    "<script>document.title = 'pwned'</script><img src=x onerror=\"document.title='pwned'\">\n\n"
    "[link](javascript:document.title='pwned') <a href=\"javascript:document.title='pwned'\">a</a>\n\n"
    '<style>body { display: none }</style><iframe src="javascript:1"></iframe>\n\n'
    "\x1b[31mred\x1b[0m \x1b]0;pwned\x07 \x1b[2J \x1b]8;;https://example.org\x07link\x1b]8;;\x07\n\n"
    "$$\\href{javascript:document.title='pwned'}{x}$$\n"
)

SCRIPTS: dict[str, Callable[..., Script]] = {
    script.__name__: script
    for script in (
        say, run, write, read, slow, sleep, allocate, orphan, env, hostile, big, events, error, close, hang, digest,
        recall,
    )
}  # fmt: skip


# --- scripts for the demo: chosen by a word in the prompt -----------------------------------------------------------

PRIMES = '''"""Print the first primes."""

import sys


def primes(count):
    found = []
    number = 2
    while len(found) < count:
        if all(number % prime for prime in found):
            found.append(number)
        number += 1
    return found


print(*primes(int(sys.argv[1]) if len(sys.argv) > 1 else 10))
'''

SUMMARISE = '''"""Describe each numeric column of a CSV or JSON file, and write the table to summary.csv."""

import csv
import json
import statistics
import sys

with open(sys.argv[1], newline="") as file:
    rows = json.load(file) if sys.argv[1].endswith(".json") else list(csv.DictReader(file))
if isinstance(rows, dict):
    rows = [dict(zip(rows, values)) for values in zip(*rows.values())]

table = [("column", "count", "mean", "min", "max")]
for column in rows[0]:
    try:
        values = [float(row[column]) for row in rows]
    except (TypeError, ValueError):
        continue
    table.append((column, len(values), round(statistics.mean(values), 3), min(values), max(values)))

with open("summary.csv", "w", newline="") as file:
    csv.writer(file).writerows(table)
for row in table:
    print("|", " | ".join(map(str, row)), "|")
'''

NOTE = (
    "\n*(This answer is from the demo's scripted model, not from Claude. Set `ANTHROPIC_API_KEY` for the real one.)*\n"
)


def look_and_write(path: str, content: str, look: str) -> Script:
    """Run a command that lists the directory, and write a file.

    The CLI overwrites a file only when the model has read it.
    """
    seen = yield [Text("Let me see what is here.\n"), bash(look)]
    if path in seen.split():
        yield [Tool("Read", file_path=path)]
    yield [Text("I'll write a small script.\n"), Tool("Write", file_path=path, content=content)]


def demo_primes(chat: Chat) -> Script:
    yield from look_and_write("primes.py", PRIMES, "ls")
    result = yield [Text("Now let me run it.\n"), bash("python3 primes.py 10")]
    yield [
        Text(
            "## Primes\n\nI wrote `primes.py`, and it works:\n\n"
            f"```console\n$ python3 primes.py 10\n{result}\n```\n\n"
            "| File | What it does |\n|---|---|\n| `primes.py` | prints the first *N* primes |\n" + NOTE
        )
    ]


def demo_summary(chat: Chat) -> Script:
    named = re.search(r"[\w./-]+\.(?:csv|json)\b", chat.prompt)
    if not named:
        yield [Text("Which CSV or JSON file? Name it in the prompt, or pass a variable with `-i`.\n" + NOTE)]
        return
    path = named[0]
    yield from look_and_write("summarise.py", SUMMARISE, f"ls; head -c 300 {shlex.quote(path)}")
    table = yield [Text("Now let me run it.\n"), bash(f"python3 summarise.py {shlex.quote(path)}")]
    head, *rest = table.splitlines() or [""]
    table = "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rest])
    yield [
        Text(
            f"## Summary of `{path}`\n\n{table}\n\n"
            "The same table is in `summary.csv`; `summarise.py` makes it:\n\n"
            f"```bash\npython3 summarise.py {path}\n```\n" + NOTE
        )
    ]


def demo_hello(chat: Chat) -> Script:
    listing = yield [Text("Let me see where I am.\n"), bash("pwd; ls -A")]
    yield [
        Text(
            "## Hello\n\nI work in a directory of my own:\n\n"
            f"```console\n$ pwd; ls -A\n{listing}\n```\n\n"
            "I am scripted and know only a few tricks. Ask me about **primes**, to **summarise** a CSV or "
            "JSON file, or what you said **before**; or give me a script, such as `[[run date]]`.\n" + NOTE
        )
    ]


DEMOS: list[tuple[str, Callable[[Chat], Script]]] = [
    (r"\bprime", demo_primes),
    (r"\b(before|earlier|remember|first prompt)", recall),
    (r"\b(summar|csv|data|describe|analy)", demo_summary),
    ("", demo_hello),
]


def play(chat: Chat) -> list[Block]:
    """The model's next turn in a conversation."""
    named = [shlex.split(match) for match in re.findall(r"\[\[(.*?)\]\]", chat.prompt, re.DOTALL)]
    named = [words for words in named if words and words[0] in SCRIPTS]
    if named:
        script = _chain(SCRIPTS[name](chat, *arguments) for name, *arguments in named)
    else:
        script = next(demo for word, demo in DEMOS if re.search(word, chat.prompt, re.IGNORECASE))(chat)
    try:
        turn = next(script)
        for result in chat.results:
            turn = script.send(result)
    except StopIteration:
        return [Text("Done.")]
    return turn


def _chain(scripts: Iterator[Script]) -> Script:
    """Run scripts one after another: the text that ends one becomes the beginning of the next one's first turn."""
    spoken: list[Block] = []
    for script in scripts:
        result: str | None = None
        while True:
            try:
                turn = script.send(result)  # type: ignore[arg-type]  # the first send is of None
            except StopIteration:
                break
            if any(isinstance(block, Tool) for block in turn):
                result = yield spoken + turn
                spoken = []
            else:
                spoken += turn
                result = ""
    yield spoken


# --- the API --------------------------------------------------------------------------------------------------------

ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 413: "request_too_large",
    429: "rate_limit_error", 529: "overloaded_error",
}  # fmt: skip


class Health(RequestHandler):
    def get(self) -> None:
        self.write({"model": MODEL})

    def head(self) -> None:
        self.finish()


class CountTokens(RequestHandler):
    def post(self) -> None:
        self.write({"input_tokens": len(self.request.body) // 4})


class Messages(RequestHandler):
    ids: ClassVar = itertools.count(1)

    def initialize(self) -> None:
        self.closed = asyncio.Event()

    def on_connection_close(self) -> None:
        self.closed.set()

    async def post(self) -> None:
        request = json.loads(self.request.body)
        # Without tools it is one of the CLI's side requests, such as for a title.
        turn: list[Block] = play(read_chat(request["messages"])) if request.get("tools") else [Text("Scripted")]
        if isinstance(turn[0], Error):
            self._fail(turn[0])
            return
        content = [self._content(block) for block in turn if isinstance(block, Text | Tool)]
        tools = any(isinstance(block, Tool) for block in turn)
        message = {
            "id": f"msg_scripted_{next(self.ids)}",
            "type": "message",
            "role": "assistant",
            "model": MODEL,
            "content": content,
            "stop_reason": "tool_use" if tools else "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": len(self.request.body) // 4,
                "output_tokens": len(json.dumps(content)) // 4,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
            },
        }
        try:
            if request.get("stream"):
                await self._stream(turn, message)
            else:
                for block in turn:
                    await self._interrupt(block)
                await self.finish(message)
        except StreamClosedError:
            pass  # the CLI was stopped, or we closed it

    async def _stream(self, turn: list[Block], message: dict[str, Any]) -> None:
        self.set_header("Content-Type", "text/event-stream")
        self._event("message_start", message={**message, "content": [], "stop_reason": None})
        await self.flush()
        for index, block in enumerate(turn):
            await self._interrupt(block)
            content = self._content(block)
            if isinstance(block, Text):
                kind, name, delay = "text_delta", "text", block.delay
                pieces = _pieces(block.text, block.size)
                content["text"] = ""
            else:
                kind, name, delay = "input_json_delta", "partial_json", 0
                pieces = _pieces(json.dumps(content["input"]), 1000)
                content["input"] = {}
            self._event("content_block_start", index=index, content_block=content)
            for piece in pieces:
                await asyncio.sleep(self.settings["delay"] if delay is None else delay)
                self._event("content_block_delta", index=index, delta={"type": kind, name: piece})
                await self.flush()
            self._event("content_block_stop", index=index)
        end = {"stop_reason": message["stop_reason"], "stop_sequence": None}
        self._event("message_delta", delta=end, usage=message["usage"])
        self._event("message_stop")

    async def _interrupt(self, block: Block) -> None:
        if isinstance(block, Close):
            self.detach().close()
            raise StreamClosedError
        if isinstance(block, Hang):
            await self.closed.wait()
            raise StreamClosedError

    def _content(self, block: Block) -> dict[str, Any]:
        if isinstance(block, Tool):
            tool_id = f"toolu_scripted_{next(self.ids)}"
            return {"type": "tool_use", "id": tool_id, "name": block.tool, "input": block.arguments}
        return {"type": "text", "text": block.text if isinstance(block, Text) else ""}

    def _event(self, kind: str, **fields: Any) -> None:
        self.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n")

    def _fail(self, error: Error) -> None:
        self.set_status(error.status, error.message)
        self.set_header("x-should-retry", "true" if error.retry else "false")
        kind = ERROR_TYPES.get(error.status, "api_error")
        self.write({"type": "error", "error": {"type": kind, "message": error.message}})


def _pieces(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), max(size, 1)))


def listen(hosts: list[str], port: int = 0, delay: float = 0.02) -> int:
    """Serve on the same port of each host, within the running event loop; returns the port (0: any free one)."""
    app = Application(
        [(r"/v1/messages", Messages), (r"/v1/messages/count_tokens", CountTokens), (r"/", Health)], delay=delay
    )
    server = HTTPServer(app)
    for host in hosts:
        sockets = bind_sockets(port, host)
        port = sockets[0].getsockname()[1]
        server.add_sockets(sockets)
    return port


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", nargs="+", default=["127.0.0.1"], help="addresses to listen on")
    parser.add_argument("--port", type=int, default=0, help="0 (default) for any free port")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds before each piece of text")
    options = parser.parse_args()
    port = listen(options.host, options.port, options.delay)
    for host in options.host:
        print(f"scripted model on http://{host}:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
