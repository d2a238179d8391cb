"""What a run did, from its events, as Markdown for a notebook and as text for a terminal.

All that a model wrote is made safe here: it can't inject HTML, links that run code, images that report home, or
escapes that a terminal obeys.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

JSON = dict[str, Any]

TEXT_LIMIT = 40_000
DETAIL_LIMIT = 4_000
LINE_LIMIT = 120

MARKS = {"running": "…", "succeeded": "✓"}  # all other states are "✗"
WORDS = {"timed_out": "timed out", "oom_killed": "out of memory"}

# Escape sequences also where they are cut off, so that what follows can't complete them.
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*(?:[@-~]|$)|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\|$)|[ -/]*(?:[0-~]|$))"
    r"|\x9b[0-?]*[ -/]*(?:[@-~]|$)"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^`\n]*)$")
_LANGUAGE = re.compile(r"[\w+#.-]{1,20}")
_CODE = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n[ \t]*\n).){1,2000}?)(?<!`)\1(?!`)", re.DOTALL)
_UNSAFE_LINK = re.compile(r"\]([(:])(?!\s*(?:https?://|mailto:|#|[\w./-]+[\s)#?]))", re.IGNORECASE)


# --- the model --------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """Something that Claude said; `done` once it is complete."""

    text: str
    done: bool = False


@dataclass
class Tool:
    """A tool call; `result` is None until it has ended, `nested` when a subagent made it."""

    name: str
    summary: str
    input: str
    nested: bool = False
    result: str | None = None
    failed: bool = False

    @property
    def done(self) -> bool:
        return self.result is not None


Item = Text | Tool


@dataclass
class Transcript:
    """What a run's events tell, in their order. Unknown events are nothing."""

    items: list[Item] = field(default_factory=list)
    _tools: dict[str, Tool] = field(default_factory=dict)
    _live: Text | None = None

    def feed(self, event: JSON) -> None:
        """Take in the next event."""
        kind = event.get("type")
        if kind == "stream_event" and not event.get("parent_tool_use_id"):
            self._delta(event.get("event") or {})
        elif kind == "assistant":
            for block in _blocks(event):
                self._said(block, nested=bool(event.get("parent_tool_use_id")))
        elif kind == "user":
            for block in _blocks(event):
                tool = self._tools.get(block.get("tool_use_id", ""))
                if block.get("type") == "tool_result" and tool:
                    tool.result = _text(block.get("content"))
                    tool.failed = bool(block.get("is_error"))
        elif kind in ("raw", "truncated"):
            self.items.append(Text(f"`{shorten(str(event.get('text', '')))}`", done=True))
        elif kind == "run_end":
            self._end_text()
            for tool in self._tools.values():
                if tool.result is None:
                    tool.result, tool.failed = "", True

    def _delta(self, event: JSON) -> None:
        if event.get("type") == "message_start":
            self._end_text()  # of a message that broke off
        text = (event.get("delta") or {}).get("text")
        if event.get("type") == "content_block_delta" and isinstance(text, str):
            if not self._live:
                self._live = Text("")
                self.items.append(self._live)
            self._live.text += text

    def _end_text(self) -> None:
        if self._live:
            self._live.done = True
            self._live = None

    def _said(self, block: JSON, nested: bool) -> None:
        if block.get("type") == "text" and not nested:
            text = str(block.get("text", ""))
            if self._live:
                self._live.text = text
                self._end_text()
            elif text.strip():
                self.items.append(Text(text, done=True))
        elif block.get("type") == "tool_use":
            given = block.get("input")
            arguments: JSON = given if isinstance(given, dict) else {}
            tool = Tool(str(block.get("name", "tool")), _summary(arguments), _input(arguments), nested)
            self.items.append(tool)
            self._tools[str(block.get("id"))] = tool


def transcript(events: Any) -> Transcript:
    """The transcript of all these events."""
    made = Transcript()
    for event in events:
        made.feed(event)
    return made


def _blocks(event: JSON) -> list[JSON]:
    message = event.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return [block for block in content or [] if isinstance(block, dict)]


def _text(content: Any) -> str:
    """A tool's result: a string, or blocks of which those that are no text are named."""
    if isinstance(content, str):
        return content
    blocks = [block for block in content or [] if isinstance(block, dict)]
    return "\n".join(str(block.get("text", f"({block.get('type', 'data')})")) for block in blocks)


def _summary(arguments: JSON) -> str:
    """The argument that tells most about a call."""
    for name in (
        "command",
        "file_path",
        "notebook_path",
        "path",
        "pattern",
        "url",
        "query",
        "description",
        "prompt",
    ):
        if isinstance(arguments.get(name), str):
            return shorten(arguments[name])
    return shorten(json.dumps(arguments, ensure_ascii=False)) if arguments else ""


def _input(arguments: JSON) -> str:
    """All arguments, one below the other; text as it is."""
    lines = []
    for name, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{name}:\n{text}" if "\n" in text else f"{name}: {text}")
    return "\n".join(lines)


# --- making it safe ---------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Without anything that a terminal would obey, and without what hides the order of characters."""
    text = _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def shorten(text: str, limit: int = LINE_LIMIT) -> str:
    """On one line of at most `limit` characters."""
    line = " ".join(clean(text[: limit * 10]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def cut(text: str, limit: int) -> str:
    """Its head and tail when it is longer than `limit` characters, with a note between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n\n… {len(text) - 2 * half:,} characters left out …\n\n{text[-half:]}"


def literal(text: str) -> str:
    """Text for inside a line of HTML in Markdown, where it means nothing but itself, line ends included."""
    return "".join(c if c.isalnum() or c in " ,.;" else f"&#{ord(c)};" for c in clean(text))


def safe_markdown(text: str) -> str:
    """The model's Markdown, without HTML, without links other than to the web, and with images as links.

    Code keeps all its characters. Renderers differ in what they take for code; so blocks are fenced anew, in a way
    that all agree on, and code in a line becomes an element that holds nothing but entities.
    """
    out: list[str] = []
    prose: list[str] = []
    lines = iter(clean(text).split("\n"))
    for line in lines:
        opened = _FENCE.match(line)
        if not opened:
            prose.append(line)
            continue
        out.append(_prose("\n".join(prose)))
        prose = []
        closing = re.compile(rf"^[ \t]*{opened[1][0]}{{{len(opened[1])},}}[ \t]*$")
        code = []
        for code_line in lines:
            if closing.match(code_line):
                break
            code.append(code_line)
        indent = line[: len(line) - len(line.lstrip())]
        out.append(fenced("\n".join(c.removeprefix(indent) for c in code), opened[2].strip()))
    out.append(_prose("\n".join(prose)))
    return "\n\n".join(part for part in out if part.strip())


def fenced(code: str, language: str = "") -> str:
    """A code block that nothing in the code can end."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language if _LANGUAGE.fullmatch(language) else ''}\n{code}\n{fence}"


def _prose(text: str) -> str:
    out = []
    end = 0
    for code in _CODE.finditer(text):
        out += [
            _no_html(text[end : code.start()]),
            f"<code>{literal(code[2].strip().replace(chr(10), ' '))}</code>",
        ]
        end = code.end()
    out.append(_no_html(text[end:]))
    return "".join(out)


def _no_html(text: str) -> str:
    text = text.replace("<", "&lt;").replace("![", "&#33;[")
    return _UNSAFE_LINK.sub(lambda found: f"]&#{ord(found[1])};", text)


# --- rendering --------------------------------------------------------------------------------------------------


def item_markdown(item: Item) -> str:
    """A text as Markdown; a tool call as one line that opens. The latter must hold no blank line: that ends HTML."""
    if isinstance(item, Text):
        return safe_markdown(cut(item.text, TEXT_LIMIT))
    mark = " ✗" if item.failed else "" if item.done else " …"
    body = "<small>result</small>".join(
        f"<pre>{literal(cut(part, DETAIL_LIMIT))}</pre>" for part in (item.input, item.result) if part
    )
    summary = f"{'↳ ' if item.nested else ''}<b>{literal(item.name)}</b> <code>{literal(item.summary)}</code>{mark}"
    return f"<details><summary>{summary}</summary>{body}</details>"


def item_text(item: Item) -> str:
    if isinstance(item, Text):
        return clean(cut(item.text, TEXT_LIMIT)).strip("\n")
    return f"{'  ' if item.nested else ''}● {shorten(item.name)} {item.summary}{' ✗' if item.failed else ''}"


def render(items: list[Item], leave_out: int = 0) -> dict[str, str]:
    """MIME bundle of these items; `leave_out` says how many came before them and are not shown."""
    note = [f"… {leave_out:,} earlier steps are left out …"] if leave_out else []
    return {
        "text/markdown": "\n\n".join(note + [item_markdown(item) for item in items]) or " ",
        "text/plain": "\n".join(note + [item_text(item) for item in items]),
    }


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f}".removesuffix(".0") + " GB"


def seconds(count: float) -> str:
    """A duration for a person."""
    if count < 60:
        return f"{count:.1f} s" if count < 10 else f"{count:.0f} s"
    minutes, rest = divmod(int(count), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def outcome(run: JSON) -> str:
    """State, duration, turns, cost and tokens of a run, as one line."""
    state = run["state"]
    parts = [f"{MARKS.get(state, '✗')} {WORDS.get(state, state)}"]
    result = run.get("result") or {}
    if run.get("ended"):
        parts[0] += f" in {seconds(run['ended'] - run['started'])}"
    if result.get("turns") is not None:
        parts.append(f"{result['turns']} turn{'s' if result['turns'] != 1 else ''}")
    if result.get("cost_usd") is not None:
        parts.append(f"${result['cost_usd']:.4f}")
    if result.get("input_tokens") is not None and result.get("output_tokens") is not None:
        parts.append(f"{result['input_tokens']:,} tokens in, {result['output_tokens']:,} out")
    if run.get("oom_kills"):
        parts.append(f"{run['oom_kills']} processes killed for memory")
    return " · ".join(parts)
