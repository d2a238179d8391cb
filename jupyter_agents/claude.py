"""Claude Code's command line and its stream-json, as pure functions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]

MAX_LINE = 8 * 2**20
KEPT_OF_LONG_LINE = 2**16
MAX_RESULT = 2**16  # characters: each state message holds the results of all agents' last runs


def options(request: dict[str, Any], session_id: str | None) -> list[str]:
    """Options of `claude` for a validated RunRequest; `session_id` is the conversation to continue.

    Values stand behind `=`, so that none can be taken for an option.
    """
    mode = request.get("permission_mode", "bypassPermissions")
    chosen = {
        "--model": request.get("model"),
        "--max-turns": request.get("max_turns"),
        "--max-budget-usd": request.get("max_budget_usd"),
        "--resume": session_id,
        "--permission-mode": None if mode == "bypassPermissions" else mode,
    }
    return [
        "--print",
        "--output-format=stream-json",
        "--verbose",
        "--include-partial-messages",
        *(["--dangerously-skip-permissions"] if mode == "bypassPermissions" else []),
        *(f"{name}={value}" for name, value in chosen.items() if value is not None),
    ]


class Lines:
    """Cuts a byte stream into lines. One longer than `MAX_LINE` is not kept; its event says so."""

    def __init__(self) -> None:
        self._partial = bytearray()
        self._dropped = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Whole lines, without their line breaks, as far as `data` completes them."""
        *complete, rest = data.split(b"\n")
        for piece in complete:
            if self._partial or len(piece) > MAX_LINE:
                self._add(piece)
                yield self._take()
            else:
                yield piece
        self._add(rest)

    def flush(self) -> Iterator[bytes]:
        """The last line, when the stream ended within it."""
        if self._partial:
            yield self._take()

    def _add(self, piece: bytes) -> None:
        self._partial += piece
        if len(self._partial) > MAX_LINE:
            self._dropped += len(self._partial) - KEPT_OF_LONG_LINE
            del self._partial[KEPT_OF_LONG_LINE:]

    def _take(self) -> bytes:
        line, dropped = bytes(self._partial), self._dropped
        self._partial.clear()
        self._dropped = 0
        if dropped:
            text = line[:KEPT_OF_LONG_LINE].decode("utf-8", "replace")
            return json.dumps({"type": "truncated", "bytes": len(line) + dropped, "text": text}).encode()
        return line


def parse(line: bytes) -> Event:
    """One line of a log as an event; what is no JSON object becomes `{"type": "raw", "text": ...}`."""
    try:
        event = _decoder.decode(line.decode())
    except (ValueError, RecursionError):
        event = None
    if isinstance(event, dict) and isinstance(event.get("type"), str):
        return event
    return {"type": "raw", "text": line.decode("utf-8", "replace")}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")  # but Python's parser would take it, and a browser's would not


_decoder = json.JSONDecoder(parse_constant=_refuse)  # json.loads would make one for each line, for twice the time


def activity(event: Event) -> str | None:
    """What the agent is doing, if this event tells: `Bash: ls -la`."""
    if event["type"] != "assistant":
        return None
    told = None
    for block in _blocks(event):
        if block.get("type") == "tool_use":
            given = block.get("input")
            values = [v for v in given.values() if isinstance(v, str)] if isinstance(given, dict) else []
            told = f"{block.get('name')}: {values[0]}" if values else str(block.get("name"))
        elif block.get("type") == "text":
            told = "Writing"
    return " ".join(told.split())[:200] if told else None


def _blocks(event: Event) -> list[dict[str, Any]]:
    message = event.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    return [b for b in content if isinstance(b, dict)] if isinstance(content, list) else []


def session_id(event: Event) -> str | None:
    value = event.get("session_id")
    return value if isinstance(value, str) and re.fullmatch("[0-9a-f-]{1,64}", value) else None


def result(event: Event) -> dict[str, Any]:
    """The API's Result of Claude's `result` event, which is as untrusted as all of the log."""
    given = event.get("usage")
    usage: dict[str, Any] = given if isinstance(given, dict) else {}
    read = [usage.get(k) for k in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")]
    inputs = [n for n in map(_integer, read) if n is not None]
    milliseconds = number(event.get("duration_ms"))
    text = event.get("result")
    return {
        "text": text[:MAX_RESULT] if isinstance(text, str) else "",
        "cost_usd": number(event.get("total_cost_usd")),
        "input_tokens": sum(inputs) if inputs else None,
        "output_tokens": _integer(usage.get("output_tokens")),
        "turns": _integer(event.get("num_turns")),
        "duration": None if milliseconds is None else milliseconds / 1000,
        "session_id": session_id(event),
    }


def number(value: object) -> float | None:
    """A number, unless it is one that JSON can't hold."""
    try:
        found = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


LIMIT_REACHED = {
    "error_max_turns": ("max_turns", "It used all the turns that it was allowed; continue it, or allow more."),
    "error_max_budget_usd": ("max_budget", "It used all the budget that it was allowed; continue it, or allow more."),
}


def failure(event: Event) -> tuple[str, str] | None:
    """Reason and sentence of a `result` event that is a failure; None for a success."""
    subtype = str(event.get("subtype"))
    if subtype in LIMIT_REACHED:
        return LIMIT_REACHED[subtype]
    if subtype == "success" and not event.get("is_error"):
        return None
    errors = event.get("errors")
    told = event.get("result") or (errors[0] if isinstance(errors, list) and errors else None) or subtype
    text = " ".join(str(told).split())[:1000]
    for reason, words in FAILURES.items():
        if any(word in text.lower() for word in words):
            return reason, f"Claude reported: {text}"
    return "claude_error", f"Claude reported: {text}"


# Claude Code words its errors for people; these are the ones that a program would want to tell apart.
FAILURES = {
    "bad_key": ("invalid api key", "invalid x-api-key", "authentication", "please run /login", "oauth token"),
    "rate_limit": ("rate limit", "rate_limit", "429", "usage limit"),
    "overloaded": ("overloaded", "529"),
    "no_network": ("connection error", "unable to connect", "econnrefused", "enotfound", "fetch failed", "timed out"),
}
