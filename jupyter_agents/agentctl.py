"""The server's side of `image/agentctl`: requests as text, answers as Python."""

from __future__ import annotations

import io
import re
import shlex
import stat
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from .errors import AgentsError, Conflict, DiskFull, NotFound, Protected, Unavailable

PATH = "/opt/jupyter-agents/agentctl"
FIRST_USER = 1000  # smaller uids are the system's
MOST_FILES = 1002  # that `load` gives


def request(values: Mapping[str, object]) -> bytes:
    """One line of shell assignments. Values may hold anything but NUL."""
    return assignments(values).encode("utf-8", "surrogateescape") + b"\n"


def assignments(values: Mapping[str, object], export: bool = False) -> str:
    """Names must be fit for a shell: they are not quoted."""
    words = [f"{name}={_quote(str(value))}" for name, value in values.items()]
    return "export " + " ".join(words) if export and words else " ".join(words) or ":"


def _quote(value: str) -> str:
    # The script reads one line: a line break in a value is the script's own variable `nl`.
    return shlex.quote(value).replace("\n", "'\"$nl\"'")


def certificates(agent: str) -> str:
    """Where a run finds the CA bundle of its network."""
    return f"/workspace/agent-{agent}/.agent/ca-bundle.pem"


ERRORS: dict[int, AgentsError] = {
    2: NotFound("There is no file or folder of that name.", "unknown_file"),
    3: Conflict("Something of that name exists already: choose another name, or delete it first.", "file_exists"),
    4: Protected(
        "That is the agent's `.env` or something that it may not use; values of variables can't be read back.",
        "protected_file",
    ),
    5: Conflict("A file is needed where there is a folder or the like, or the other way round.", "not_a_file"),
    6: AgentsError("The upload was cut off before its end; nothing was changed.", "bad_request"),
    7: Conflict("Changes can't be shown: the workspace image has no git.", "no_git"),
    8: Unavailable(
        "The workspace image has no `claude` command: build the image anew, or add Claude Code to your own.",
        "image_broken",
        "jupyter agents build",
    ),
}


def error(code: int, stderr: bytes) -> AgentsError:
    """Why a request failed, by its exit code and what it printed."""
    text = stderr.decode("utf-8", "replace").strip()
    if "No space left" in text or "quota exceeded" in text:
        return DiskFull("The workspace's disk is full: delete files or agents to make room.", "disk_full")
    known = ERRORS.get(code)
    if known:
        return type(known)(known.message, known.reason, known.command)
    if code in (126, 127):
        message = "The workspace image lacks something that every image needs (`sh`, coreutils): use ours, or mend it."
        return Unavailable(message, "image_broken", "jupyter agents build")
    return AgentsError(f"That could not be done: {text[-300:] or f'exit code {code}'}", "failed")


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    uid: int
    anonymous_bytes: int
    supervises: str | None


@dataclass
class Sample:
    """One look into a workspace: cgroup figures, agents' owners, processes."""

    figures: dict[str, int] = field(default_factory=dict)
    uids: dict[str, int] = field(default_factory=dict)
    processes: list[Process] = field(default_factory=list)
    time: float = field(default_factory=time.time)

    @classmethod
    def parse(cls, text: str) -> Sample:
        """Lines that make no sense are passed over."""
        sample = cls()
        for line in text.splitlines():
            kind, _, rest = line.partition(" ")
            words = rest.split()
            try:
                if kind == "m":
                    sample.figures[words[0]] = int(words[1])
                elif kind == "a":
                    uid = int(words[0])
                    if uid >= FIRST_USER:  # else a restored volume would have us do as root what an agent asks for
                        sample.uids[words[2].partition("/agent-")[2]] = uid
                elif kind == "p":
                    pid, parent, uid, anonymous = map(int, words[:4])
                    supervises = None if words[4] == "-" else words[4]
                    sample.processes.append(Process(pid, parent, uid, anonymous * 1024, supervises))
            except (IndexError, ValueError):
                continue
        return sample

    @property
    def supervisors(self) -> dict[str, Process]:
        """By run id, whoever they belong to: an agent may call a process of its own so."""
        return {p.supervises: p for p in self.processes if p.supervises}

    def memory(self, warning_bytes: int, limit_bytes: int) -> dict[str, Any]:
        """The API's Memory. `docker stats` subtracts the inactive file cache, when that is the smaller."""
        usage = self.figures.get("memory.usage_in_bytes", self.figures.get("memory.current", 0))
        inactive = self.figures.get("total_inactive_file", self.figures.get("inactive_file", 0))
        used = usage - inactive if inactive < usage else usage
        # Without a cap the kernel says a huge number (v1), or a word, which is no figure (v2).
        told = self.figures.get("memory.limit_in_bytes", self.figures.get("memory.max", limit_bytes))
        limit = min(told, limit_bytes)
        level = "critical" if used >= 0.95 * limit else "warning" if used >= warning_bytes else "ok"
        return {
            "used_bytes": used,
            "limit_bytes": limit,
            "level": level,
            "oom_kills": self.figures.get("oom_kill", 0),
            "peak_bytes": self.figures.get("peak", 0),
            "runs": self._shares(),
            "time": self.time,
        }

    def _shares(self) -> dict[str, int]:
        """Anonymous memory by run: of all that descends from its supervisor."""
        parents = {p.pid: p.parent for p in self.processes}
        roots = {p.pid: p.supervises for p in self.processes if p.supervises}
        shares = {run: 0 for run in roots.values() if run}
        for process in self.processes:
            pid, steps = process.pid, 0
            while pid in parents and pid not in roots and steps < len(parents):
                pid, steps = parents[pid], steps + 1
            run = roots.get(pid)
            if run:
                shares[run] += process.anonymous_bytes
        return shares


KINDS = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFLNK: "symlink"}


# A name goes up to the next line that begins so. It can't hold such a line itself, as that has a `/`.
ENTRY = re.compile(r"^([0-9a-f]+) (\d+) (-?\d+) \./", re.MULTILINE)


def entries(text: str, folder: str) -> list[dict[str, Any]]:
    """The API's Entries of `stat -c '%f %s %Y %n'` of `./NAME`s, sorted by name."""
    found: list[dict[str, Any]] = []
    starts = list(ENTRY.finditer(text))
    for this, following in zip(starts, [*starts, None][1:], strict=True):
        mode, size, modified = this.groups()
        name = text[this.end() : following.start() if following else len(text)].removesuffix("\n")
        kind = KINDS.get(stat.S_IFMT(int(mode, 16)), "other")
        path = f"{folder}/{name}" if folder else name
        found.append({"name": name, "path": path, "type": kind, "size": int(size), "modified": float(modified)})
    return sorted(found, key=lambda e: str(e["name"]))


def agent_tar(agent: str, uid: int) -> bytes:
    """A new agent's directory, to be unpacked at `/`: its owner and modes are set as it appears."""
    home = f"workspace/agent-{agent}"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, mode in [
            (home, tarfile.DIRTYPE, 0o700),
            (f"{home}/.env", tarfile.REGTYPE, 0o600),
            (f"{home}/.agent", tarfile.DIRTYPE, 0o700),
            (f"{home}/.agent/created", tarfile.REGTYPE, 0o600),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, uid, uid, int(time.time())
            tar.addfile(info)
    return out.getvalue()


def untar(data: bytes) -> dict[str, tuple[bytes, float]]:
    """Content and time of the regular files in a tar that a workspace made; a broken one counts as far as it goes.

    The agent may have written it: nothing in it becomes larger than it came.
    """
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in islice(tar, MOST_FILES):
                plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and info.sparse is None
                content = tar.extractfile(info) if plain else None
                if content:
                    files[info.name.removeprefix("./")] = (content.read(), info.mtime)
    except (tarfile.TarError, EOFError, ValueError):
        pass
    return files
