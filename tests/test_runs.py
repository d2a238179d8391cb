"""Runs of the real CLI in real containers: what reaches it, what is told of it, and how it ends."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

import docker
import pytest
from conftest import Api
from helpers import (
    derived_image,
    end_of,
    eventually,
    finish,
    log,
    nothing_left,
    output,
    processes,
    serving,
    text,
)

pytestmark = pytest.mark.usefixtures("model")

HARD = """--help
-p
ünïcödé 🚀 \u202e \ufeff
'"`$(id)$HOME\\
{braces} {0} %s
a;b|c&d>e
[[digest]]"""


@pytest.mark.parametrize("prompt", [HARD, "[[digest]]" + "é{}'\"\n-- " * 100_000], ids=["hard", "long"])
async def test_prompt_arrives_as_it_is(user: str, prompt: str) -> None:
    prompt = prompt.encode()[: 2**20].decode("utf-8", "ignore").strip()
    async with serving(user) as workspace:
        run = await finish(workspace, "a", prompt)
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    assert text(run) == f"{len(prompt)} {digest}"
    assert run.prompt == prompt[:2000]


async def test_conversation(user: str) -> None:
    async with serving(user) as workspace:
        first = await finish(workspace, "a", "The word is xylophone. [[say fine]]")
        second = await finish(workspace, "a", "[[recall]]")
        other = await finish(workspace, "b", "[[recall]]")
    async with serving(user) as workspace:  # another container, the same volume
        await workspace.connect()
        third = await finish(workspace, "a", "[[recall]]")
        new = await finish(workspace, "a", "[[recall]]", **{"continue": False})
    assert "xylophone" in text(second)
    assert "xylophone" in text(third)
    assert "prompt 3" in text(third)
    assert "first prompt of our" in text(other)
    assert "first prompt of our" in text(new)
    assert [first.continued, second.continued, third.continued, new.continued] == [False, True, True, False]
    assert first.result and second.result and new.result
    assert first.result["session_id"] != new.result["session_id"]


async def test_options_reach_claude(user: str) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a")
        await workspace.create_agent("b")
        await workspace.create_agent("c")
        turns, budget, plan = await asyncio.gather(
            finish(workspace, "a", "[[run echo 1]] [[run echo 2]]", max_turns=1),
            finish(workspace, "b", "[[run echo 1]] [[run echo 2]]", max_budget_usd=0.000001),
            finish(workspace, "c", "[[say hi]]", model="claude-some-model", permission_mode="plan"),
        )
        events = await log(workspace, plan)
    assert (turns.state, turns.error and turns.error["reason"]) == ("failed", "max_turns")
    assert (budget.state, budget.error and budget.error["reason"]) == ("failed", "max_budget")
    assert events[0]["type"] == "system"
    assert events[0]["model"] == "claude-some-model"
    assert events[0]["permissionMode"] == "plan"
    assert plan.model == "claude-some-model"


async def test_result(user: str) -> None:
    told: list[dict[str, Any]] = []
    before = time.time()
    async with serving(user, audit=told.append) as workspace:
        run = await finish(workspace, "a", "[[run echo secret-in-prompt]]")
    assert run.result
    assert run.state == "succeeded"
    assert run.error is None
    assert "secret-in-prompt" in run.result["text"]
    assert run.result["turns"] == 2
    assert run.result["cost_usd"] > 0
    assert run.result["input_tokens"] > 0
    assert run.result["output_tokens"] > 0
    assert 0 < run.result["duration"] < 60
    assert len(run.result["session_id"]) == 36
    assert run.peak_bytes > 50 * 2**20
    assert before - 1 <= run.started <= run.ended <= time.time() + 1
    assert [event["action"] for event in told] == ["agent_created", "run_started", "run_ended"]
    assert told[2] == {"action": "run_ended", "user": user, "agent": "a", "run": run.id, "state": "succeeded"}
    assert "secret" not in json.dumps(told)


async def test_ten_at_once(api: Api) -> None:
    names = [f"a{n}" for n in range(10)]
    assert {status for status, _ in await asyncio.gather(*(api("POST", "agents", {"id": n}) for n in names))} == {201}
    answers = await asyncio.gather(*(api("POST", f"agents/{n}/runs", {"prompt": "[[sleep 60]]"}) for n in names))
    assert sorted(status for status, _ in answers) == [201] * 3 + [409] * 7
    assert {body["reason"] for status, body in answers if status == 409} == {"too_many_runs"}
    started = [body for status, body in answers if status == 201]
    status, body = await api("POST", f"agents/{started[0]['agent']}/runs", {"prompt": "[[say hi]]"})
    assert (status, body["reason"]) == (409, "agent_busy")
    _, listed = await api("GET", "runs")
    assert {run["id"] for run in listed} == {run["id"] for run in started}
    assert {run["state"] for run in listed} == {"running"}
    stopped = await asyncio.gather(*(api("DELETE", f"runs/{run['id']}") for run in started))
    assert [(status, body["state"]) for status, body in stopped] == [(200, "cancelled")] * 3
    status, _ = await api("POST", f"agents/{names[0]}/runs", {"prompt": "[[say hi]]"})
    assert status == 201


# --- the log --------------------------------------------------------------------------------------------------------


async def test_log_has_the_same_numbers_for_everyone(api: Api, jp_ws_fetch: Any) -> None:
    await api("POST", "agents", {"id": "a"})
    _, run = await api("POST", "agents/a/runs", {"prompt": "[[slow 40 0.05]]"})

    async def over_http(since: int, follow: int) -> list[Any]:
        _, body = await api("GET", f"runs/{run['id']}/events", params={"since": since, "follow": follow})
        return [json.loads(line) for line in body.splitlines()]

    async def over_websocket(since: int) -> list[Any]:
        socket = await jp_ws_fetch("jupyter-agents", "events")
        await socket.write_message(json.dumps({"subscribe": run["id"], "since": since}))
        events: list[Any] = []
        while message := json.loads(await socket.read_message()):
            if message["type"] == "events":
                assert message["since"] == since + len(events)
                events += message["events"]
            elif message["type"] == "end":
                assert message["next"] == since + len(events)
                break
        socket.close()
        return events

    live = await asyncio.gather(
        over_http(0, 1), over_http(7, 1), over_websocket(0), over_websocket(3), over_websocket(0)
    )
    whole = await over_http(0, 0)
    assert len(whole) > 45
    assert whole[-1]["type"] == "run_end"
    assert "".join(_words(whole)).split() == [f"word{n:03d}" for n in range(40)]
    assert live == [whole, whole[7:], whole, whole[3:], whole]
    assert await over_http(len(whole) - 1, 1) == whole[-1:]
    assert await over_http(len(whole), 1) == []
    assert await over_http(10**9, 0) == []
    assert await over_websocket(5) == whole[5:]


def _words(events: list[Any]) -> list[str]:
    deltas = [e["event"]["delta"] for e in events if e["type"] == "stream_event" and "delta" in e["event"]]
    return [delta["text"] for delta in deltas if delta.get("type") == "text_delta"]


async def test_log_of_ten_thousand_events_while_it_grows(user: str) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a")
        run = await workspace.start_run("a", {"prompt": "[[events 10000]]"})
        first, second = await asyncio.gather(log(workspace, run, follow=True), log(workspace, run, 5000, follow=True))
        assert await log(workspace, run) == first
    assert second == first[5000:]
    assert "".join(_words(first)).split() == [f"{n:07d}" for n in range(10000)]


# --- an image whose `claude` runs its prompt as a shell script, for what the real one never does on request -----------


@pytest.fixture(scope="module")
def shell_image(docker_api: docker.APIClient) -> Iterator[str]:
    tag = f"jupyter-agents-test:{secrets.token_hex(4)}"
    derived_image(docker_api, tag, {"/usr/local/bin/claude": b"#!/bin/sh\nexec sh\n"})
    yield tag
    docker_api.remove_image(tag)


RESULT = json.dumps(
    {"type": "result", "subtype": "success", "is_error": False, "result": "fine", "session_id": "0-1"},
    separators=(",", ":"),
)


async def test_strange_output(user: str, shell_image: str) -> None:
    script = f"""
        echo 'no json'; echo; echo '[1]'; echo '{{"type": 3}}'; echo '{{"type":"new","n":NaN}}'; printf '\\377\\376\\n'
        head -c 9000000 /dev/zero | tr '\\0' x; echo
        echo '{RESULT}'
        printf 'no line break'
    """
    async with serving(user, docker={"image": shell_image}) as workspace:
        run = await finish(workspace, "a", script)
        events = await log(workspace, run)
        tail = await log(workspace, run, 6)
    assert [event["type"] for event in events] == [*["raw"] * 6, "truncated", "result", "raw", "run_end"]
    assert events[6]["bytes"] == 9_000_000
    assert events[6]["text"] == "x" * 2**16
    assert tail == events[6:]
    assert (run.state, text(run)) == ("succeeded", "fine")


async def test_odd_ends(user: str, docker_api: docker.APIClient, shell_image: str) -> None:
    said = f"echo '{RESULT}'"
    cases = {
        "silent": ("exit 0", "failed", "without a result"),
        "stderr": ("echo 'error: unknown option' >&2; exit 1", "failed", "code 1: error: unknown option"),
        "killed": ("kill -9 $$", "failed", "code 137"),
        "child": (f"(sleep 1; setsid sleep 300) & {said}", "succeeded", ""),
        "lingers": (f"{said}; exec sleep 300", "succeeded", ""),
        "lingers-deaf": (f"{said}; trap '' TERM; while :; do sleep 300; done", "succeeded", ""),
        "lingers-stopped": (f"{said}; kill -STOP $$; sleep 300", "succeeded", ""),
        "deaf": ("trap '' TERM; while :; do echo on; sleep 0.1; done", "timed_out", "timeout"),
    }
    async with serving(user, docker={"image": shell_image}, run_linger=1, max_runs=len(cases)) as workspace:
        for name in cases:
            await workspace.create_agent(name)
        runs = await asyncio.gather(*(finish(workspace, n, script, timeout=5) for n, (script, _, _) in cases.items()))
        for run in runs:
            _, state, told = cases[run.agent]
            assert (run.agent, run.state) == (run.agent, state)
            assert told in (run.error or {"message": ""})["message"]
            assert run.ended - run.started < 12
            await nothing_left(docker_api, workspace, run.agent)


# --- stopping -------------------------------------------------------------------------------------------------------

BROOD = (
    "[[run sleep 301 & setsid sleep 302 & env -i setsid sleep 303 & "
    "(setsid sh -c 'env -i sh -c \"trap : TERM HUP INT; sleep 304; sleep 305\"' &) ; echo hatched; sleep 306]]"
)


async def test_cancel_stops_all_that_it_started(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a")
        await workspace.create_agent("b")
        run = await workspace.start_run("a", {"prompt": BROOD})
        other = await workspace.start_run("b", {"prompt": "[[sleep 60]]"})
        assert workspace.container
        container, uid = workspace.container.id, workspace.agents["a"].uid
        await eventually(lambda: any("sleep 306" in line for line in processes(docker_api, container, uid)))
        assert sum("sleep 30" in line for line in processes(docker_api, container, uid)) >= 5
        began = time.monotonic()
        stopped = await workspace.cancel(run.id)
        assert time.monotonic() - began < 5
        assert (stopped.state, stopped.error and stopped.error["reason"]) == ("cancelled", "cancelled")
        await nothing_left(docker_api, workspace, "a")
        assert workspace.run(other.id).active
        assert (await workspace.cancel(run.id)).state == "cancelled"  # once more does no harm
        again = await finish(workspace, "a", "[[say back]]")
        assert (again.state, text(again)) == ("succeeded", "back")
        events = await log(workspace, run)
        assert [e["reason"] for e in events if e["type"] == "run_end"] == ["cancelled"]


async def test_cancel_at_once(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a")
        run = await workspace.start_run("a", {"prompt": "[[sleep 60]]"})
        assert (await workspace.cancel(run.id)).state == "cancelled"
        await nothing_left(docker_api, workspace, "a")
        starting = asyncio.ensure_future(workspace.start_run("a", {"prompt": "[[sleep 60]]"}))
        run = await eventually(lambda: next((r for r in workspace.active_runs), None))
        stopped, _ = await asyncio.gather(workspace.cancel(run.id), starting)
        assert stopped.state == "cancelled"


async def test_orphan_ends_with_its_run(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as workspace:
        run = await finish(workspace, "a", "[[orphan 300]]")
        assert run.state == "succeeded"
        await nothing_left(docker_api, workspace, "a")


async def test_time_limits(user: str) -> None:
    async with serving(user, run_idle_timeout=4) as workspace:
        for name in "abc":
            await workspace.create_agent(name)
        hung, late, slow = await asyncio.gather(
            finish(workspace, "a", "[[hang]]"),
            finish(workspace, "b", "[[slow 100 0.5]]", timeout=4),
            finish(workspace, "c", "[[slow 12 0.5]]"),
        )
    assert (hung.state, hung.error and hung.error["reason"]) == ("timed_out", "hung")
    assert (late.state, late.error and late.error["reason"]) == ("timed_out", "timed_out")
    assert late.ended - late.started < 20  # of the 50 that it would take
    assert slow.state == "succeeded"


# --- how runs end ---------------------------------------------------------------------------------------------------


async def test_failures_are_told_apart(user: str) -> None:
    async with serving(user) as workspace:
        for name in "abc":
            await workspace.create_agent(name)
        await workspace.set_env("c", {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9", "CLAUDE_CODE_MAX_RETRIES": "1"})
        await workspace.create_agent("d")
        bad_key, rate_limit, no_network = await asyncio.gather(
            finish(workspace, "a", "[[error 401]]"),
            finish(workspace, "b", "[[error 429]]"),
            finish(workspace, "c", "[[say hi]]"),
        )
        overloaded = await finish(workspace, "d", "[[error 529]]")
    for run, reason, words in [
        (bad_key, "bad_key", "Invalid API key"),
        (rate_limit, "rate_limit", "rate limit"),
        (overloaded, "overloaded", "Overloaded"),
        (no_network, "no_network", "Unable to connect"),
    ]:
        assert run.error
        assert (run.state, run.error["reason"]) == ("failed", reason)
        assert words in run.error["message"]


async def test_tool_out_of_memory(user: str) -> None:
    async with serving(user, memory_limit=500 * 2**20) as workspace:
        run = await finish(workspace, "a", "[[allocate 600 1]]")
    assert (run.state, run.error) == ("succeeded", None)
    assert run.oom_kills == 1
    assert run.peak_bytes == pytest.approx(500 * 2**20, rel=0.02)


# What Claude starts is killed rather than Claude itself, unless Claude's own score is the higher one.
KILL_CLAUDE = r"""[[run '
for p in /proc/[0-9]*; do
  if [ "$(readlink $p/exe)" = /usr/local/bin/claude ]; then echo 1000 > $p/oom_score_adj; fi
done
python3 -c "import time; held = bytearray(370 << 20); held[::4096] = held[::4096]; time.sleep(60)"
']]"""


async def test_claude_out_of_memory(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user, memory_limit=400 * 2**20) as workspace:
        run = await finish(workspace, "a", KILL_CLAUDE)
        await nothing_left(docker_api, workspace, "a")
        assert (await finish(workspace, "a", "[[say hi]]")).state == "succeeded"
    assert run.error
    assert (run.state, run.error["reason"]) == ("oom_killed", "oom_killed")
    assert "its cap is 400 MB" in run.error["message"]
    assert "peaked at 400 MB" in run.error["message"] or "peaked at 399 MB" in run.error["message"]
    assert run.oom_kills >= 1


async def test_container_removed_in_the_middle(user: str, docker_api: docker.APIClient) -> None:
    told: list[dict[str, Any]] = []
    async with serving(user, audit=told.append) as workspace:
        await workspace.create_agent("a")
        run = await workspace.start_run("a", {"prompt": "[[write kept.txt hello]] [[sleep 60]]"})
        assert workspace.container
        container, uid = workspace.container.id, workspace.agents["a"].uid
        # Only the process tells that the file has been written: a log names tools and files before they are used.
        await eventually(lambda: any("sleep(60" in line for line in processes(docker_api, container, uid)))
        following = asyncio.ensure_future(log(workspace, run, follow=True))
        docker_api.remove_container(container, force=True)
        assert (await end_of(workspace, run, 20)).state == "lost"
        events = await asyncio.wait_for(following, 20)
        assert run.error
        assert run.error["reason"] == "workspace_lost"
        assert told[-1]["state"] == "lost"
        assert events[0]["type"] == "system"
        assert text(await finish(workspace, "a", "[[run cat kept.txt]]")).split()[1] == "hello"
        assert len(workspace.runs_of("a")) == 2
    async with serving(user) as workspace:
        await workspace.connect()
        assert workspace.run(run.id).state == "lost"


async def test_what_an_agent_can_do_to_its_own_run(user: str) -> None:
    async with serving(user, cleanup_grace=4) as workspace:
        for name in "abc":
            await workspace.create_agent(name)
        killed, log_gone, forged = await asyncio.gather(
            finish(workspace, "a", "[[run sleep 1; kill -9 -1]]"),
            finish(workspace, "b", "[[run 'rm -r ~/../runs; echo gone']]"),
            finish(workspace, "c", "[[run 'echo {} > ~/../runs/*/record; chmod 0 ~/../runs; echo forged']]"),
        )
        assert (killed.state, killed.error and killed.error["reason"]) == ("lost", "run_killed")
        assert not log_gone.active
        assert not forged.active
        again = await asyncio.gather(*(finish(workspace, name, "[[say hi]]") for name in "ab"))
        assert [run.state for run in again] == ["succeeded", "succeeded"]


# --- what a run changed ---------------------------------------------------------------------------------------------

CHANGES = r"""[[run 'sleep 1; echo new > added.txt; echo more >> changed.txt; rm deleted.txt; mv moved.txt to.txt;
head -c 100 /dev/zero > data.bin; printf x > "$(printf "line\nbreak")"; ln -s /etc/passwd link;
git init -q nested; cd nested; echo inner > inner.txt; git add .; git -c user.name=a -c user.email=a@b commit -qm m;
cd ..; git init -q; echo X=changed-secret >> .env; mkdir -p node_modules/x; echo y > node_modules/x/y; echo done']]"""


async def test_diff(user: str) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a")
        assert await workspace.diff("a") == ""
        await workspace.set_env("a", {"X": "secret"})
        before = "for f in changed deleted; do echo $f > $f.txt; done; seq 1 100 > moved.txt; echo done"
        await finish(workspace, "a", f"[[run {before}]]")
        first = await workspace.diff("a")
        assert "+++ b/changed.txt" in first
        run = await finish(workspace, "a", CHANGES)
        assert "done" in text(run), text(run)
        diff = await workspace.diff("a")
        last = await finish(workspace, "a", "[[say nothing]]")
        assert await workspace.diff("a") == ""
    assert last.state == "succeeded"
    assert "+++ b/added.txt\n@@ -0,0 +1 @@\n+new" in diff
    assert "+++ b/changed.txt\n@@ -1 +1,2 @@\n changed\n+more" in diff
    assert "--- a/deleted.txt\n+++ /dev/null" in diff
    assert "rename from moved.txt\nrename to to.txt" in diff
    assert "Binary files /dev/null and b/data.bin differ" in diff
    assert r'"b/line\nbreak"' in diff
    assert "+++ b/link\n@@ -0,0 +1 @@\n+/etc/passwd" in diff
    assert "+++ b/nested/inner.txt\n@@ -0,0 +1 @@\n+inner" in diff
    for never in ("secret", ".env", "node_modules", ".agent", ".git/"):
        assert never not in diff


async def test_diff_after_a_snapshot_was_killed(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as workspace:
        await finish(workspace, "a", "[[write old.txt old]]")
        assert workspace.container
        lock = "/workspace/agent-a/.agent/baseline/index.lock"
        uid = str(workspace.agents["a"].uid)
        output(docker_api, workspace.container.id, "touch", lock, user=uid)
        await finish(workspace, "a", "[[sleep 4]] [[write new.txt new]]")
        first, second = await asyncio.gather(workspace.diff("a"), workspace.diff("a"))
    assert "+++ b/new.txt" in first
    assert "old.txt" not in first
    assert second == first
