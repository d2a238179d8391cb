"""Pure functions: parsing of what is untrusted, quoting, names, arithmetic."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shlex
import shutil
import subprocess
import tarfile
import time
from typing import Any

import docker
import pytest
from dotenv import dotenv_values
from helpers import serving
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jupyter_agents import agentctl, claude, environment
from jupyter_agents.docker_engine import slug
from jupyter_agents.run import RUN_ID, Run, new_id

MEBI = 2**20

# --- lines and events -----------------------------------------------------------------------------------------------


def cut(pieces: list[bytes]) -> list[bytes]:
    lines = claude.Lines()
    return [line for piece in pieces for line in lines.feed(piece)] + list(lines.flush())


@given(st.lists(st.binary(max_size=20)), st.integers(1, 5))
def test_lines_do_not_depend_on_how_they_arrive(lines: list[bytes], size: int) -> None:
    data = b"\n".join(line.replace(b"\n", b"") for line in lines)
    whole = data.removesuffix(b"\n").split(b"\n") if data else []
    assert cut([data[i : i + size] for i in range(0, len(data), size)]) == whole


def test_split_utf8_and_crlf() -> None:
    line = json.dumps({"type": "x", "text": "é🚀"}, ensure_ascii=False).encode()
    pieces = [line[i : i + 1] for i in range(len(line))] + [b"\r", b"\n", b"\n"]
    first, blank = cut(pieces)
    assert claude.parse(first) == {"type": "x", "text": "é🚀"}
    assert claude.parse(blank) == {"type": "raw", "text": ""}


def test_long_lines_are_kept_up_to_a_limit() -> None:
    fits = b'{"type":"x","text":"' + b"a" * (5 * MEBI) + b'"}'
    exactly = b"b" * claude.MAX_LINE
    over = b"c" * (claude.MAX_LINE + 1)
    huge = [b"d" * MEBI] * 50
    lines = claude.Lines()
    found = list(lines.feed(fits + b"\n" + exactly + b"\n" + over + b"\n"))
    for piece in huge:
        found += lines.feed(piece)
        assert len(lines._partial) <= claude.MAX_LINE + MEBI  # what it holds is bounded
    found += lines.feed(b"\nafter\n")
    assert [len(found[0]), len(found[1])] == [len(fits), claude.MAX_LINE]
    truncated = [claude.parse(line) for line in found[2:4]]
    assert [(e["type"], e["bytes"]) for e in truncated] == [("truncated", len(over)), ("truncated", 50 * MEBI)]
    assert [e["text"] for e in truncated] == ["c" * 2**16, "d" * 2**16]
    assert found[4:] == [b"after"]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json",
        b'{"type": "x", "n": NaN}',
        b'{"type": "x", "n": -Infinity}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"[]",
        b"1",
        b"null",
        b'"type"',
        b'{"no": "type"}',
        b'{"type": 5}',
        b'{"type": null}',
        b'{"type": "x"} trailing',
        b"\xff\xfe{}",
        b'{"type": "x", "n": ' + b"9" * 5000 + b"}",
    ],
    ids=range(16),
)
def test_what_is_no_event_becomes_raw(line: bytes) -> None:
    event = claude.parse(line)
    assert event == {"type": "raw", "text": line.decode("utf-8", "replace")}
    json.dumps(event).encode()


def test_events_of_unknown_types_are_kept() -> None:
    assert claude.parse(b' {"type": "new", "x": 1e3} ') == {"type": "new", "x": 1000.0}


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    [
        "message",
        "content",
        "usage",
        "result",
        "errors",
        "subtype",
        "is_error",
        "session_id",
        "num_turns",
        "type",
        "duration_ms",
        "total_cost_usd",
        "input_tokens",
        "output_tokens",
        "input",
        "name",
        "exit_code",
        "reason",
        "ended",
    ]
)
nested: Any = st.dictionaries(keys, json_values | st.lists(st.dictionaries(keys, json_values, max_size=3), max_size=2))
hostile: Any = st.dictionaries(keys, json_values | nested, max_size=6)
quick = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(hostile, st.sampled_from(["result", "assistant", "system", "run_end"]))
def test_no_event_breaks_what_reads_it(event: dict[str, Any], kind: str) -> None:
    event["type"] = kind
    activity = claude.activity(event)
    assert activity is None or ("\n" not in activity and len(activity) <= 200)
    result = claude.result(event)
    assert isinstance(result["text"], str)
    assert all(not isinstance(value, (dict, list, bool)) for value in result.values())
    failure = claude.failure(event)
    assert failure is None or (failure[0] and failure[1])
    run = Run("20260101-000000-00000000", "a", "", None, False, 0, "")
    run.see(event)
    run.conclude(event, event, b"\xff", 2**30)
    assert not run.active
    json.dumps(run.to_dict())


# --- options and outcomes -------------------------------------------------------------------------------------------


def test_options() -> None:
    plain = claude.options({"prompt": "--model=evil"}, None)
    assert plain == [
        "--print",
        "--output-format=stream-json",
        "--verbose",
        "--include-partial-messages",
        "--dangerously-skip-permissions",
    ]
    request = {
        "prompt": "",
        "model": "--resume=x; id",
        "max_turns": 3,
        "max_budget_usd": 0.5,
        "permission_mode": "plan",
    }
    assert claude.options(request, "5e55")[4:] == [
        "--model=--resume=x; id",
        "--max-turns=3",
        "--max-budget-usd=0.5",
        "--resume=5e55",
        "--permission-mode=plan",
    ]


END = {"type": "run_end", "exit_code": 0, "reason": "", "started": 1, "ended": 5, "oom_kills": 0, "peak_bytes": 1000}
GOOD = {"type": "result", "subtype": "success", "is_error": False, "result": "done", "session_id": "5e55"}
NONE = {"type": "raw"}


@pytest.mark.parametrize(
    ("end", "result", "stderr", "state", "reason", "words"),
    [
        ({}, GOOD, b"", "succeeded", None, ""),
        ({"reason": "lingered", "exit_code": 143}, GOOD, b"", "succeeded", None, ""),
        ({}, {**GOOD, "is_error": True, "result": "Invalid API key"}, b"", "failed", "bad_key", "Invalid API key"),
        ({}, {**GOOD, "is_error": True, "result": "API Error: 429 rate limit"}, b"", "failed", "rate_limit", "429"),
        ({}, {**GOOD, "is_error": True, "result": "529 Overloaded"}, b"", "failed", "overloaded", "529"),
        ({}, {**GOOD, "is_error": True, "result": "Connection error."}, b"", "failed", "no_network", "Connection"),
        ({}, {**GOOD, "is_error": True, "result": "odd"}, b"", "failed", "claude_error", "odd"),
        ({}, {**GOOD, "subtype": "error_max_turns"}, b"", "failed", "max_turns", "turns"),
        ({}, {**GOOD, "subtype": "error_max_budget_usd"}, b"", "failed", "max_budget", "budget"),
        (
            {},
            {**GOOD, "subtype": "error_new", "result": None, "errors": ["told"]},
            b"",
            "failed",
            "claude_error",
            "told",
        ),
        ({"exit_code": 1}, NONE, b"  what\n went wrong ", "failed", "claude_error", "what went wrong"),
        ({"exit_code": 1}, NONE, b"", "failed", "claude_error", "exit code 1"),
        ({"exit_code": 0}, NONE, b"", "failed", "claude_error", "without a result"),
        ({"exit_code": 137, "oom_kills": 1}, NONE, b"", "oom_killed", "oom_killed", "cap is 1024 MB"),
        ({"exit_code": 137}, NONE, b"", "failed", "claude_error", "exit code 137"),
        ({"exit_code": 0, "oom_kills": 1}, GOOD, b"", "succeeded", None, ""),
        ({"exit_code": 143, "reason": "cancelled"}, NONE, b"", "cancelled", "cancelled", "cancelled"),
        ({"exit_code": 143, "reason": "cancelled"}, GOOD, b"", "cancelled", "cancelled", "cancelled"),
        ({"exit_code": 143, "reason": "timed_out"}, NONE, b"", "timed_out", "timed_out", "timeout"),
        ({"exit_code": 143, "reason": "hung"}, NONE, b"", "timed_out", "hung", "no sign of life"),
    ],
    ids=range(20),
)
def test_outcomes(
    end: dict[str, Any], result: dict[str, Any], stderr: bytes, state: str, reason: str | None, words: str
) -> None:
    run = Run("20260101-000000-00000000", "a", "", None, False, 0, "")
    run.conclude({**END, **end}, result, stderr, 2**30)
    assert (run.state, run.error and run.error["reason"]) == (state, reason)
    assert words in (run.error["message"] if run.error else "")
    assert run.ended == 5
    assert run.activity is None


def test_result() -> None:
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 2, "cache_read_input_tokens": 4, "output_tokens": 8}
    event = {**GOOD, "usage": usage, "num_turns": 3, "duration_ms": 1500, "total_cost_usd": 0.25}
    assert claude.result(event) == {
        "text": "done",
        "cost_usd": 0.25,
        "input_tokens": 7,
        "output_tokens": 8,
        "turns": 3,
        "duration": 1.5,
        "session_id": "5e55",
    }


def files_of(**changes: object) -> dict[str, bytes]:
    record = {"id": "20260101-000000-00000000", "prompt": "p", "model": None, "continued": False, "started": 1}
    record |= {"container": "c", **changes}
    return {"record": json.dumps({k: v for k, v in record.items() if v is not ...}).encode()}


def test_run_from_files() -> None:
    files = files_of(prompt="x" * 3000)
    run = Run.from_files("a", files, 2**30)
    assert run
    assert (run.active, run.prompt) == (True, "x" * 2000)
    files |= {
        "session": b'"session_id":"5e55-1"',
        "result": json.dumps({**GOOD, "session_id": None}).encode(),
        "end": json.dumps(END).encode(),
    }
    run = Run.from_files("a", files, 2**30)
    assert run
    assert (run.state, run.session_id) == ("succeeded", "5e55-1")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"record": b""},
        {"record": b"\xff"},
        {"record": b"[" * 200_000},
        {"record": b"[]"},
        {"record": b"null"},
        files_of(id="../../x"),
        files_of(id="20260101-000000-00000000\n"),
        files_of(id=None),
        files_of(started="soon"),
        files_of(started=None),
        files_of(prompt=...),
    ],
    ids=range(12),
)
def test_records_that_make_no_sense(files: dict[str, bytes]) -> None:
    assert Run.from_files("a", files, 2**30) is None


@quick
@given(st.dictionaries(st.sampled_from(["end", "result", "session", "stderr.tail"]), st.binary(max_size=50)), hostile)
def test_garbage_beside_a_record(files: dict[str, bytes], end: dict[str, Any]) -> None:
    for content in (files, files | {"end": json.dumps({**end, "type": "run_end"}).encode()}):
        run = Run.from_files("a", files_of() | content, 2**30)
        assert run
        json.dumps(run.to_dict(), allow_nan=False)


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1" + "0" * 400])
def test_numbers_that_are_too_large(value: str) -> None:
    end = '{"type": "run_end", "exit_code": 0, "ended": N, "oom_kills": N, "peak_bytes": N}'.replace("N", value)
    result = '{"type": "result", "subtype": "success", "total_cost_usd": N, "duration_ms": N}'.replace("N", value)
    run = Run.from_files("a", files_of() | {"end": end.encode(), "result": result.encode()}, 2**30)
    assert run is not None
    json.dumps(run.to_dict(), allow_nan=False)
    record = files_of()["record"].replace(b'"started": 1', f'"started": {value}'.encode())
    run = Run.from_files("a", {"record": record}, 2**30)
    assert run is None or json.dumps(run.to_dict(), allow_nan=False)


def test_run_ids() -> None:
    made = {new_id() for _ in range(100)}
    assert len(made) == 100
    assert all(RUN_ID.fullmatch(run) for run in made)


# --- requests to agentctl, and its answers --------------------------------------------------------------------------

SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]
values = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.sampled_from(
    ["'", "\n", "$HOME", "`id`", "\\", "\\\n", "'\"$nl\"'", "a\n\nb\n", "-n", "~", "*", "!", "\r\n", ""]
)
SCRIPT = "nl='\n'\nIFS= read -r request\neval \"$request\"\n"


@pytest.mark.parametrize("shell", SHELLS)
@quick
@given(st.lists(values, min_size=1, max_size=5))
@example(["a'b\n'c\"d\\", "$(touch /tmp/x)", "\n", "'\n'"])
def test_shell_assignments(shell: str, given_values: list[str]) -> None:
    named = {f"V{n}": value for n, value in enumerate(given_values)}
    show = "".join(f'printf "%s\\0" "${name}"\n' for name in named)
    done = subprocess.run(
        [shell, "-c", SCRIPT + show], input=agentctl.request(named), capture_output=True, check=True, timeout=30
    )
    assert done.stderr == b""
    assert done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1] == given_values
    line = agentctl.assignments(named, export=True)
    assert "\n" not in line
    show = f"nl='\n'\nIFS= read -r exports\n(eval \"$exports\"; {shlex.quote(shutil.which('env') or 'env')} -0)"
    done = subprocess.run([shell, "-c", show], input=line.encode() + b"\n", capture_output=True, check=True, timeout=30)
    seen = dict(pair.split("=", 1) for pair in done.stdout.decode().split("\0") if "=" in pair)
    assert {name: seen.get(name) for name in named} == named


@pytest.mark.skipif("dash" not in SHELLS, reason="there is no dash here; the containers' own is tested by all runs")
def test_there_is_a_posix_shell() -> None:
    assert subprocess.run(["dash", "-n", "-c", "x=${a#b}"], check=True).returncode == 0


def test_nothing_to_export() -> None:
    assert agentctl.assignments({}, export=True) == ":"


V1 = """m memory.usage_in_bytes 500000000
m memory.limit_in_bytes 1073741824
m total_inactive_file 100000000
m inactive_file 7
m oom_kill 2
m peak 600000000
m free_kb 1000
a 10001 1795528195 /workspace/agent-demo
a 10002 1795528195 /workspace/agent-other
p 1 0 65534 100 -
p 10 1 10001 200 20260101-000000-00000000
p 11 10 10001 3000 -
p 12 11 10001 40 -
p 13 1 10002 9 -
"""
V2 = """m memory.current 500000000
m memory.max max
m inactive_file 100000000
m oom_kill 0
m peak 600000000
"""


def test_memory_of_cgroup_v1() -> None:
    sample = agentctl.Sample.parse(V1)
    memory = sample.memory(800 * MEBI, 2**30)
    assert memory == {
        "used_bytes": 400_000_000,
        "limit_bytes": 2**30,
        "level": "ok",
        "oom_kills": 2,
        "peak_bytes": 600_000_000,
        "runs": {"20260101-000000-00000000": 3240 * 1024},
        "time": sample.time,
    }
    assert sample.uids == {"demo": 10001, "other": 10002}
    assert list(sample.supervisors) == ["20260101-000000-00000000"]


def test_memory_of_cgroup_v2() -> None:
    memory = agentctl.Sample.parse(V2).memory(800 * MEBI, 2**30)
    assert (memory["used_bytes"], memory["limit_bytes"], memory["level"]) == (400_000_000, 2**30, "ok")
    capped = agentctl.Sample.parse(V2.replace("max max", "max 536870912")).memory(800 * MEBI, 2**30)
    assert capped["limit_bytes"] == 2**29


@pytest.mark.parametrize(("used", "level"), [(799, "ok"), (800, "warning"), (972, "warning"), (973, "critical")])
def test_levels(used: int, level: str) -> None:
    text = f"m memory.current {used * MEBI + 5 * MEBI}\nm inactive_file {5 * MEBI}\nm memory.max {2**30}"
    assert agentctl.Sample.parse(text).memory(800 * MEBI, 2**30)["level"] == level


def test_more_inactive_than_used_is_not_subtracted() -> None:
    text = "m memory.current 100\nm inactive_file 100"
    assert agentctl.Sample.parse(text).memory(800 * MEBI, 2**30)["used_bytes"] == 100


@given(st.text(alphabet="map 0123456789-/x\n.") | st.text())
def test_samples_pass_over_what_makes_no_sense(text: str) -> None:
    sample = agentctl.Sample.parse(text + "\nm oom_kill 5\n")
    assert sample.memory(1, 2)["oom_kills"] == 5


def test_processes_in_a_circle() -> None:
    sample = agentctl.Sample.parse("p 5 6 1 10 -\np 6 5 1 10 -\np 7 1 1 10 run\n")
    assert sample.memory(1, 2)["runs"] == {"run": 10240}


async def test_memory_is_what_docker_stats_shows(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as workspace:
        container = await workspace.connect()
        for _ in range(5):  # it changes from moment to moment
            await workspace.measure()
            stats = await asyncio.to_thread(docker_api.stats, container.id, stream=False)
            await workspace.measure()
            memory = stats["memory_stats"]
            inactive = memory["stats"].get("total_inactive_file", memory["stats"].get("inactive_file", 0))
            theirs = memory["usage"] - (inactive if inactive < memory["usage"] else 0)
            assert workspace.memory
            if abs(workspace.memory["used_bytes"] - theirs) < 2 * MEBI:
                break
        assert workspace.memory["used_bytes"] == pytest.approx(theirs, abs=2 * MEBI)
        assert workspace.memory["limit_bytes"] == memory["limit"] == 2**30


def test_entries() -> None:
    text = "81a4 5 100 ./b\n41ed 4096 200 ./a dir\na1ff 4 -300 ./link\n11a4 0 400 ./fifo\n"
    found = agentctl.entries(text, "in/here")
    assert [(e["name"], e["path"], e["type"], e["size"], e["modified"]) for e in found] == [
        ("a dir", "in/here/a dir", "directory", 4096, 200.0),
        ("b", "in/here/b", "file", 5, 100.0),
        ("fifo", "in/here/fifo", "other", 0, 400.0),
        ("link", "in/here/link", "symlink", 4, -300.0),
    ]
    assert agentctl.entries("", "") == []


@given(st.lists(st.text(st.characters(exclude_characters="/\0"), min_size=1), unique=True))
@example(["a\n81a4 5 100 b", "\n", "a\n", " ", "81a4 5 100 .", "\r", "\u2028"])
def test_entries_of_hostile_names(names: list[str]) -> None:
    text = "".join(f"81a4 5 100 ./{name}\n" for name in names)
    assert [e["name"] for e in agentctl.entries(text, "")] == sorted(names)


@given(st.text())
def test_entries_of_nonsense(text: str) -> None:
    assert isinstance(agentctl.entries(text, ""), list)


@given(st.binary(max_size=2000))
def test_a_broken_tar_is_no_error(data: bytes) -> None:
    assert isinstance(agentctl.untar(data), dict)


def test_a_tar_counts_as_far_as_it_goes() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("./.env", ".agent/created"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 600, 7
            tar.addfile(info, io.BytesIO(b"x" * 600))
    whole = agentctl.untar(out.getvalue())
    assert whole == {".env": (b"x" * 600, 7), ".agent/created": (b"x" * 600, 7)}
    assert agentctl.untar(out.getvalue()[: 512 + 1024 + 100]) == {".env": (b"x" * 600, 7)}


def test_a_tar_does_not_become_larger_than_it_came() -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        info = tarfile.TarInfo("file")
        info.size = 10 * MEBI
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    assert agentctl.untar(packed.getvalue()) == {}
    info = tarfile.TarInfo("hole")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % 10**8  # its size when the hole is filled
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    with tarfile.open(fileobj=io.BytesIO(header)) as tar:
        assert tar.getmembers()[0].size == 10**8
    assert agentctl.untar(bytes(header) + bytes(1024)) == {}


def test_root_owns_no_agent() -> None:
    assert agentctl.Sample.parse("a 0 0 /workspace/agent-x\na 60706 0 /workspace/agent-y\n").uids == {"y": 60706}


def test_a_run_can_not_have_started_in_the_future() -> None:
    run = Run.from_files("a", files_of(started=1e12), MEBI)
    assert run and run.started <= time.time()


@pytest.mark.parametrize(
    ("code", "stderr", "status", "reason"),
    [
        (2, b"", 404, "unknown_file"),
        (3, b"", 409, "file_exists"),
        (4, b"", 403, "protected_file"),
        (1, b"head: write error: No space left on device", 507, "disk_full"),
        (2, b"cp: Disk quota exceeded", 507, "disk_full"),
        (127, b"sh: find: not found", 503, "image_broken"),
        (9, b"\xff odd", 400, "failed"),
    ],
)
def test_errors_of_agentctl(code: int, stderr: bytes, status: int, reason: str) -> None:
    error = agentctl.error(code, stderr)
    assert (error.status, error.reason) == (status, reason)
    assert error.message.endswith((".", "odd"))


# --- variables ------------------------------------------------------------------------------------------------------

names = st.from_regex(environment.NAME, fullmatch=True).filter(environment.settable)
dotenv_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@quick
@given(st.dictionaries(names, dotenv_text, max_size=4))
def test_what_is_set_is_read_back(variables: dict[str, str]) -> None:
    text = environment.edit("# kept\n", variables)
    assert environment.read(text) == variables
    assert text.endswith("# kept\n")
    assert dotenv_values(stream=io.StringIO(text), interpolate=False) == variables


@quick
@example("B='never closed", {"A": "1"})
@given(dotenv_text, st.dictionaries(names, dotenv_text | st.none(), max_size=3))
def test_edits_change_only_what_they_name(text: str, changes: dict[str, str | None]) -> None:
    before = environment.read(text)
    after = environment.read(environment.edit(text, changes))
    expected = before | {k: v for k, v in changes.items() if v is not None}
    assert after == {k: v for k, v in expected.items() if changes.get(k, "") is not None}


def test_edit_keeps_comments_and_other_lines() -> None:
    text = "# a comment\n\nexport A=1 # one\nB='2'\nA=3\nnot a variable\nC=4"
    assert environment.edit(text, {"A": "it's\n\\", "C": None}) == (
        "A='it\\'s\n\\\\'\n# a comment\nB='2'\nnot a variable\n"
    )


def test_dotenv_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_SERVER", "s3cr3t")
    text = 'A=${SECRET_OF_SERVER}\nB="${SECRET_OF_SERVER}"\nC=$SECRET_OF_SERVER\nPPID=1\nD\n=e\n'
    assert environment.read(text) == {"A": "${SECRET_OF_SERVER}", "B": "${SECRET_OF_SERVER}", "C": "$SECRET_OF_SERVER"}


def test_which_variables_a_run_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "server")
    monkeypatch.setenv("ANTHROPIC_MODEL", "")
    monkeypatch.setenv("SECRET_OF_SERVER", "s3cr3t")
    ours = environment.passed_on(environment.PASSED_ON, {"X": "configured", "bad name": "x"})
    assert ours.get("ANTHROPIC_API_KEY") == "server"
    assert "SECRET_OF_SERVER" not in ours
    assert "ANTHROPIC_MODEL" not in ours
    seen = environment.for_run(ours, "/ca.pem", "X=agent\nSSL_CERT_FILE=mine\n")
    assert (seen["X"], seen["SSL_CERT_FILE"], seen["PIP_CERT"]) == ("agent", "mine", "/ca.pem")
    assert "bad name" not in seen
    assert not set(environment.for_run({}, None, ""))


# --- names ----------------------------------------------------------------------------------------------------------


def test_slug_never_changes() -> None:
    assert slug("ada") == "ada-fdee430d"
    assert slug("Ada Lovelace <ada@example.org>") == "ada-lovelace-ada-example-org-9b27b5f0"
    assert slug("\N{GREEK SMALL LETTER ALPHA}") == "user-3e32da96"


@given(st.text(max_size=300))
@example("x" * 200)
@example("..")
@example("")
@example("Ünïcödé/../" * 30)
def test_slug_is_a_name_that_docker_takes(user: str) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}-[0-9a-f]{8}", slug(user))


@given(st.lists(st.text(), unique=True, min_size=2, max_size=5))
@example(["ada", "Ada", "ADA", "ada ", "a-da", "a.da"])
@example(["x" * 200, "x" * 201])
def test_slugs_tell_users_apart(users: list[str]) -> None:
    assert len({slug(user) for user in users}) == len(users)
