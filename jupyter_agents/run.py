"""One run: its record, and how it ended."""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import asdict, dataclass
from typing import Any

from . import claude

RUN_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")
SHOWN_OF_PROMPT = 2000


def new_id() -> str:
    """Sorts by time, and two servers never make the same."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


@dataclass
class Run:
    """What the API shows of a run, and the few things that it doesn't show."""

    id: str
    agent: str
    prompt: str
    model: str | None
    continued: bool
    started: float
    container: str
    state: str = "running"
    ended: float | None = None
    activity: str | None = None
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    oom_kills: int = 0
    peak_bytes: int | None = None
    session_id: str | None = None
    logged: int = 0  # events in its log, as far as we have read them

    HIDDEN = ("container", "session_id", "logged")

    @property
    def active(self) -> bool:
        return self.state == "running"

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in self.HIDDEN}

    def record(self) -> str:
        """What is written beside the log when the run starts: one line of JSON."""
        kept = ("id", "agent", "prompt", "model", "continued", "started", "container")
        return json.dumps({key: getattr(self, key) for key in kept})

    @classmethod
    def from_files(cls, agent: str, files: dict[str, bytes], memory_bytes: int) -> Run | None:
        """A run read back from its directory, by file name; None when its record makes no sense.

        Without an end it is taken for active: whether it is, only its container knows.
        """
        try:
            record = json.loads(files["record"])
            started = claude.number(record["started"])
            if started is None:
                return None
            run = cls(
                id=str(record["id"]),
                agent=agent,
                prompt=str(record["prompt"])[:SHOWN_OF_PROMPT],
                model=None if record["model"] is None else str(record["model"]),
                continued=bool(record["continued"]),
                started=min(started, time.time()),  # the agent may have written it
                container=str(record["container"]),
            )
        except (KeyError, TypeError, ValueError, RecursionError):
            return None
        if not RUN_ID.fullmatch(run.id):
            return None
        found = re.search(rb'"session_id":"([0-9a-f-]{1,64})"', files.get("session", b""))
        run.session_id = found[1].decode() if found else None
        end = claude.parse(files.get("end", b""))
        if end["type"] == "run_end":
            run.conclude(end, claude.parse(files.get("result", b"")), files.get("stderr.tail", b""), memory_bytes)
        return run

    def see(self, event: claude.Event) -> bool:
        """Take note of an event of the log; whether something that is shown has changed."""
        self.session_id = self.session_id or claude.session_id(event)
        activity = claude.activity(event)
        if activity is None or activity == self.activity:
            return False
        self.activity = activity
        return True

    def conclude(self, end: claude.Event, result: claude.Event, stderr: bytes, memory_bytes: int) -> None:
        """Settle how it ended, from its `run_end` event, Claude's `result` event (or none) and standard error."""
        self.activity = None
        self.oom_kills = int(claude.number(end.get("oom_kills")) or 0)
        self.peak_bytes = int(claude.number(end.get("peak_bytes")) or 0) or None
        if result["type"] == "result":
            self.result = claude.result(result)
            self.session_id = self.result["session_id"] or self.session_id
        # The end is in whole seconds, so that it may seem to lie before the start.
        took = (self.result and self.result["duration"]) or 0
        now = time.time()
        self.ended = max(claude.number(end.get("ended")) or now, min(self.started + took, now))
        self.state, reason, message = self._outcome(end, result, stderr, memory_bytes)
        self.error = {"reason": reason, "message": message} if reason else None

    def _outcome(
        self, end: claude.Event, result: claude.Event, stderr: bytes, memory_bytes: int
    ) -> tuple[str, str, str]:
        reason, code = end.get("reason"), end.get("exit_code")
        if reason == "cancelled":
            return "cancelled", "cancelled", "The run was cancelled."
        if reason == "timed_out":
            return "timed_out", "timed_out", "The run took longer than its timeout and was stopped."
        if reason == "hung":
            return "timed_out", "hung", "The run gave no sign of life for too long and was stopped."
        if code == 137 and self.oom_kills:
            cap, peak = memory_bytes / 2**20, (self.peak_bytes or 0) / 2**20
            text = f"The workspace ran out of memory and Claude was killed: its cap is {cap:.0f} MB"
            return "oom_killed", "oom_killed", f"{text}, its use peaked at {peak:.0f} MB. Run less at once."
        if result["type"] == "result":
            failed = claude.failure(result)
            return ("failed", *failed) if failed else ("succeeded", "", "")
        told = " ".join(stderr.decode("utf-8", "replace").split())[-1000:]
        how = f"Claude ended without a result, with exit code {code}"
        return "failed", "claude_error", f"{how}: {told}" if told else f"{how}."

    def settle(self, read: Run) -> None:
        """Take over the final state of the same run, read from its directory."""
        self.__dict__.update(read.__dict__)

    def lose(self, reason: str = "workspace_lost") -> None:
        """Its container, or its supervisor, is gone and left no end behind; `reason` is one of `LOST`."""
        self.state, self.activity, self.ended = "lost", None, time.time()
        self.error = {"reason": reason, "message": LOST[reason]}


LOST = {
    "workspace_lost": "The workspace's container went away during the run; what the agent wrote until then is kept.",
    "run_killed": "All of the run was killed from within the workspace; what the agent wrote until then is kept.",
    "disk_full": "The workspace's disk filled up and the run's end is lost: delete files or agents to make room.",
}
