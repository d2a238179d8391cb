"""Agents in a real container: directories, owners, variables, removal."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import docker
import pytest
from conftest import Api
from helpers import end_of, eventually, finish, output, serving, text

from jupyter_agents.app import AUDIT_ID
from jupyter_agents.errors import AgentsError, BadRequest, Conflict, NotFound, Stuck, TooLarge
from jupyter_agents.run import Run
from jupyter_agents.workspace import Workspace


def try_in(api: docker.APIClient, workspace: Workspace, agent: str, script: str) -> tuple[int, str]:
    """Exit code and output of a shell script as the agent's uid."""
    assert workspace.container
    uid = workspace.agent(agent).uid
    made = api.exec_create(workspace.container.id, ["sh", "-c", script], user=f"{uid}:{uid}")["Id"]
    told: bytes = api.exec_start(made)
    return api.exec_inspect(made)["ExitCode"], told.decode()


def engine_events(api: docker.APIClient, container: str, since: float) -> list[str]:
    """What the engine says happened to a container."""
    events = api.events(since=since, until=time.time() + 0.01, filters={"container": container}, decode=True)
    return [json.dumps(event) for event in events]


# --- creation and isolation -----------------------------------------------------------------------------------------


async def test_creating_an_agent_is_one_call_to_the_engine(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as workspace:
        container = await workspace.connect()
        before = time.time()
        await workspace.create_agent("a1")
        actions = [json.loads(event)["Action"] for event in engine_events(docker_api, container.id, before)]
        assert actions == ["extract-to-dir"]
        told = output(docker_api, container.id, "ls", "/workspace/agent-a1")
        assert "Permission denied" in told  # root without a capability is nobody


async def test_owner_and_mode(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as workspace:
        agents = [await workspace.create_agent(name) for name in ("a1", "a2", "a-" * 16)]
        assert len({agent.uid for agent in agents}) == 3
        for agent in agents:
            assert 60706 <= agent.uid < 61184
            code, told = try_in(
                docker_api, workspace, agent.id, f"cd /workspace/agent-{agent.id} && stat -c '%u %g %a %n' . .env"
            )
            assert (code, told) == (0, f"{agent.uid} {agent.uid} 700 .\n{agent.uid} {agent.uid} 600 .env\n")


async def test_agents_cannot_reach_each_other(user: str, docker_api: docker.APIClient, model: str) -> None:
    async with serving(user) as workspace:
        for name in ("mine", "other"):
            await workspace.create_agent(name)
        await workspace.set_env("mine", {"SECRET": "s3cr3t"})
        assert try_in(docker_api, workspace, "mine", "cd /workspace/agent-mine; umask 0; echo s3cr3t > notes")[0] == 0
        run = await workspace.start_run("mine", {"prompt": "[[sleep 60]]"})
        for script in (
            "ls /workspace/agent-mine",
            "cat /workspace/agent-mine/notes",
            "cat /workspace/agent-mine/.env",
            "cd /workspace/agent-other; ln -sf ../agent-mine/notes link; cat link",
            "cd /workspace/agent-other; ln -sfn ../agent-mine folder; ls folder/ && cat folder/.env",
            "cd /workspace/agent-other; ln ../agent-mine/notes hard",
            "echo mine > /workspace/agent-mine/planted",
            "rm -rf /workspace/agent-mine",
            "mv /workspace/agent-mine /workspace/agent-yours",
            "mkdir /workspace/agent-planted",
            'for p in /proc/[0-9]*; do if [ -O "$p" ]; then continue; fi; cat $p/environ && exit; done 2>&1; exit 1',
            "grep -a s3cr[3]t /proc/[0-9]*/cmdline",
            "kill -9 -1 && sleep 0.2; exit 1",
            "su root; exit 1",
        ):
            code, told = try_in(docker_api, workspace, "other", script)
            assert code != 0, script
            assert "s3cr3t" not in told, script
        assert workspace.run(run.id).active
        assert try_in(docker_api, workspace, "mine", "cat /workspace/agent-mine/notes") == (0, "s3cr3t\n")


async def test_without_isolation_all_are_the_user_claude(user: str, docker_api: docker.APIClient, model: str) -> None:
    async with serving(user, isolate_agents=False) as workspace:
        run = await finish(workspace, "a1", "[[run id -un]]")
        await workspace.create_agent("a2")
        assert "claude" in text(run)
        assert {agent.uid for agent in workspace.agents.values()} == {1000}
        assert try_in(docker_api, workspace, "a2", "stat -c '%u %a' /workspace/agent-a1") == (0, "1000 700\n")
        await workspace.remove_agent("a1")
        assert list(workspace.agents) == ["a2"]


async def test_a_run_lives_in_its_directory(user: str, model: str) -> None:
    async with serving(user) as workspace:
        run = await finish(workspace, "a1", "[[run pwd; echo $HOME $CLAUDE_CONFIG_DIR; id -u]]")
        uid = workspace.agent("a1").uid
        home = "/workspace/agent-a1"
        assert f"{home}\n{home}/.agent/home {home}/.agent/claude\n{uid}" in text(run)


@pytest.mark.parametrize(
    "name",
    ["../x", "Upper", "", "a" * 33, "ünï", "a\n", "-a", "a b", "a/b", ".", "a\0", "a_b", "1" * 33, "$(id)"],
)
async def test_bad_ids(api: Api, user: str, docker_api: docker.APIClient, name: str) -> None:
    status, error = await api("POST", "agents", {"id": name})
    assert (status, error["reason"]) == (400, "bad_agent_id")
    assert docker_api.containers(all=True, filters={"label": f"jupyter-agents.user={user}"}) == []


async def test_longest_and_shortest_id(api: Api) -> None:
    for name in ("a", "0", "a" * 32, "a--b-"):
        status, agent = await api("POST", "agents", {"id": name})
        assert (status, agent["id"], agent["state"]) == (201, name, "idle")
        assert abs(agent["created"] - time.time()) < 5


async def test_existing_unknown_and_eleventh(api: Api) -> None:
    for n in range(10):
        assert (await api("POST", "agents", {"id": f"a{n}"}))[0] == 201
    assert (await api("POST", "agents", {"id": "a3"}))[1]["reason"] == "agent_exists"
    status, error = await api("POST", "agents", {"id": "a10"})
    assert (status, error["reason"]) == (409, "too_many_agents")
    assert "10 agents" in error["message"]
    for verb, path, body in [
        ("GET", "agents/none", None),
        ("DELETE", "agents/none", None),
        ("GET", "agents/none/env", None),
        ("PATCH", "agents/none/env", {"A": "1"}),
        ("GET", "agents/none/files/", None),
        ("GET", "agents/none/diff", None),
        ("POST", "agents/none/runs", {"prompt": "x"}),
    ]:
        status, error = await api(verb, path, body)
        assert (status, error["reason"]) == (404, "unknown_agent"), (verb, path)
    assert (await api("DELETE", "agents/a3"))[0] == 204
    assert (await api("POST", "agents", {"id": "a10"}))[0] == 201


async def test_simultaneous_creations(user: str) -> None:
    async with serving(user) as workspace:
        tries = [workspace.create_agent(f"a{n % 12}") for n in range(24)]
        answers = await asyncio.gather(*tries, return_exceptions=True)
        reasons = sorted(a.reason if isinstance(a, AgentsError) else "created" for a in answers)
        assert reasons.count("created") == 10
        assert set(reasons) == {"created", "agent_exists", "too_many_agents"}
    async with serving(user) as workspace:
        await workspace.connect()
        assert len(workspace.agents) == 10
        assert len({agent.uid for agent in workspace.agents.values()}) == 10


# --- removal --------------------------------------------------------------------------------------------------------


async def test_removal_deletes_its_directory_and_only_that(user: str, docker_api: docker.APIClient, model: str) -> None:
    async with serving(user) as workspace:
        for name in ("a1", "a1-b", "a2"):
            await workspace.create_agent(name)
            assert try_in(docker_api, workspace, name, f"cd /workspace/agent-{name}; echo kept > notes")[0] == 0
        made = (
            "cd /workspace/agent-a1; ln -s ../agent-a2 link; mkdir -p locked/inner ' -rf' .hidden; touch locked/x -- -f"
            "; ln -s ../agent-a2/notes linked; chmod 0 locked/x locked/inner; chmod 500 locked; chmod 0 .hidden"
            "; chmod 777 .; mkdir -m 777 shared; mkdir .agent/home"
        )
        assert try_in(docker_api, workspace, "a1", made)[0] == 0
        others = "cd /workspace/agent-a1; mkdir theirs shared/theirs; touch theirs/x shared/theirs/x; chmod 500 theirs"
        assert try_in(docker_api, workspace, "a2", others)[0] == 0
        run = await workspace.start_run("a1", {"prompt": "[[sleep 60]]"})
        await workspace.remove_agent("a1")
        assert sorted(workspace.agents) == ["a1-b", "a2"]
        assert not run.active
        assert workspace.active_runs == []
        with pytest.raises(NotFound):
            workspace.run(run.id)
        for name in ("a1-b", "a2"):
            assert try_in(docker_api, workspace, name, f"cat /workspace/agent-{name}/notes") == (0, "kept\n")
        assert workspace.container
        assert output(docker_api, workspace.container.id, "stat", "-c", "%n", "/workspace/agent-a1").startswith("stat:")
        again = await workspace.create_agent("a1")
        assert try_in(docker_api, workspace, again.id, "ls -A /workspace/agent-a1") == (0, ".agent\n.env\n")
        assert workspace.runs_of("a1") == []


async def test_removing_twice_at_once(user: str) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a1")
        answers = await asyncio.gather(
            workspace.remove_agent("a1"), workspace.remove_agent("a1"), return_exceptions=True
        )
        assert None in answers
        assert all(a is None or isinstance(a, (NotFound, Conflict)) for a in answers), answers
        assert workspace.agents == {}


# --- variables ------------------------------------------------------------------------------------------------------

HARD = {
    "QUOTES": "a'b\"c''\\'\\\"",
    "LINES": "first\nsecond\n\n  third\n",
    "TABS": "\ta\rb\r\nc\x07\x1b[31m",
    "DOLLAR": "$HOME ${HOME} $(id) `id` $$ $1 \\$x",
    "BACKSLASH": "\\ \\\\ \\n \\",
    "UNICODE": "ünï 🚀 \u202e\ufeff\u2028",
    "SPACES": "  around  ",
    "COMMENT": "a # b",
    "EQUALS": "a=b=c",
    "EMPTY": "",
    "DASHES": "--help",
    "LONG": "x" * 60000,
    "lower_case": "{braces} %s !!",
    # Names that our own shell script uses too.
    "run": "mine",
    "dir": "/nowhere",
    "setsid": "/bin/false",
    "root": "/nowhere",
    "agent": "other",
    "nl": "x",
    "exports": "y",
}
DUMP = b"import json, os\nprint(json.dump(dict(os.environ), open('env.json', 'w')))\n"


async def environment_of_a_run(api: Api, agent: str) -> dict[str, str]:
    status, _ = await api("PUT", f"agents/{agent}/files/dump.py", data=DUMP)
    assert status == 201
    status, run = await api("POST", f"agents/{agent}/runs", {"prompt": "[[run python3 dump.py]]"})
    assert status == 201, run
    assert (await api("GET", f"runs/{run['id']}/events", params={"follow": 1}))[0] == 200
    _, run = await api("GET", f"runs/{run['id']}")
    assert run["state"] == "succeeded", run
    _, dumped = await api("GET", f"agents/{agent}/files/env.json")
    return dict(json.loads(dumped))


async def test_values_arrive_exactly(api: Api) -> None:
    await api("POST", "agents", {"id": "a1"})
    status, names = await api("PATCH", "agents/a1/env", HARD)
    assert (status, names) == (200, sorted(HARD))
    seen = await environment_of_a_run(api, "a1")
    assert {name: seen.get(name) for name in HARD} == HARD
    status, names = await api("PATCH", "agents/a1/env", {"QUOTES": None, "nothing": None, "LINES": "1"})
    assert (status, names) == (200, sorted(HARD.keys() - {"QUOTES"}))
    assert (await api("GET", "agents/a1/env"))[1] == names
    seen = await environment_of_a_run(api, "a1")
    assert "QUOTES" not in seen
    assert {name: seen[name] for name in names} == {name: (HARD | {"LINES": "1"})[name] for name in names}


async def test_only_what_is_listed_reaches_a_run(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_SERVER", "s3cr3t")
    monkeypatch.setenv("ANTHROPIC_SOMETHING", "s3cr3t")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("ANTHROPIC_DEFAULT_HAIKU_MODEL", "from-the-server")
    monkeypatch.setenv("MAX_THINKING_TOKENS", "1000")
    await api("POST", "agents", {"id": "a1"})
    await api("PATCH", "agents/a1/env", {"MAX_THINKING_TOKENS": "2000", "OWN": "${SECRET_OF_SERVER}"})
    # A file that the agent wrote itself is read in the same way.
    seen = await environment_of_a_run(api, "a1")
    assert "s3cr3t" not in json.dumps(seen)
    assert seen["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "from-the-server"
    assert seen["MAX_THINKING_TOKENS"] == "2000"
    assert seen["OWN"] == "${SECRET_OF_SERVER}"
    assert not {name for name in seen if name.startswith(("JUPYTER", "JPY"))} - {"JUPYTER_AGENTS_RUN"}


async def test_dotenv_that_the_agent_wrote(api: Api, docker_api: docker.APIClient, user: str) -> None:
    await api("POST", "agents", {"id": "a1"})
    lines = 'export A="x ${HOME} $PATH"\n# note\nB=${SECRET_OF_SERVER:-none}\ns3cr3t\nPPID=1\nUID=2\nC=\n'
    container = docker_api.containers(filters={"label": f"jupyter-agents.user={user}"})[0]["Id"]
    uid = output(docker_api, container, "stat", "-c", "%u", "/workspace/agent-a1").strip()
    script = f"cat > /workspace/agent-a1/.env <<'EOF'\n{lines}EOF\n"
    assert output(docker_api, container, "sh", "-c", script, user=f"{uid}:{uid}") == ""
    assert (await api("GET", "agents/a1/env"))[1] == ["A", "B", "C"]  # a line without `=` may be anything
    seen = await environment_of_a_run(api, "a1")
    assert (seen["A"], seen["B"], seen["C"]) == ("x ${HOME} $PATH", "${SECRET_OF_SERVER:-none}", "")
    _, names = await api("PATCH", "agents/a1/env", {"D": "1", "B": None})
    assert names == ["A", "C", "D"]
    kept = output(docker_api, container, "cat", "/workspace/agent-a1/.env", user=f"{uid}:{uid}")
    assert kept == "D='1'\n" + lines.replace("B=${SECRET_OF_SERVER:-none}\n", "")


async def test_env_refuses_what_no_variable_can_be(api: Api) -> None:
    await api("POST", "agents", {"id": "a1"})
    await api("PATCH", "agents/a1/env", {"KEPT": "1"})
    for body in [
        {"A B": "s3cr3t"},
        {"A=s": "s3cr3t"},
        {"": "s3cr3t"},
        {"1A": "s3cr3t"},
        {"A\n": "s3cr3t"},
        {"Ä": "s3cr3t"},
        {"A" * 129: "s3cr3t"},
        {"PPID": "s3cr3t"},
        {"UID": "s3cr3t"},
        {"A": 5},
        {"A": ["s3cr3t"]},
        {"A": "s3cr3t\0"},
        {"A": "s3cr3t\ud800"},
        {"A": "s3cr3t" * 20000},
        ["s3cr3t"],
        "s3cr3t",
    ]:
        status, error = await api("PATCH", "agents/a1/env", body)
        assert (status, error["reason"]) == (400, "bad_request"), body
        assert "s3cr3t" not in error["message"]
    status, error = await api("PATCH", "agents/a1/env", {f"V{n}": "x" * 60000 for n in range(20)})
    assert (status, error["reason"]) == (413, "too_large")
    assert (await api("GET", "agents/a1/env"))[1] == ["KEPT"]


async def test_values_never_come_back(
    api: Api,
    jp_serverapp: Any,
    jp_ws_fetch: Any,
    jp_logging_stream: Any,
    docker_api: docker.APIClient,
    user: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    began = time.time()
    secret = "s3cr3t-of-the-agent"
    told: list[Any] = []

    async def listen(logger: Any, schema_id: str, data: dict[str, Any]) -> None:
        told.append(data)

    jp_serverapp.event_logger.add_listener(schema_id=AUDIT_ID, listener=listen)
    socket = await jp_ws_fetch("jupyter-agents", "events", on_message_callback=told.append)
    for step in [
        ("POST", "agents", {"id": "a1"}),
        ("PATCH", "agents/a1/env", {"TOKEN": secret}),
        ("PATCH", "agents/a1/env", {"bad name": secret}),
        ("GET", "agents/a1/env", None),
        ("GET", "agents/a1", None),
        ("GET", "agents", None),
        ("GET", "workspace", None),
        ("GET", "agents/a1/files/", None),
        ("GET", "agents/a1/files/.env", None),
        ("POST", "agents/a1/runs", {"prompt": f"[[sleep 20]] {secret}"}),
    ]:
        told.append((step[1], await api(*step)))
    run = told[-1][1][1]
    assert told[-1][1][0] == 201
    run.pop("prompt")  # which is the user's own text
    container = docker_api.containers(filters={"label": f"jupyter-agents.user={user}"})[0]["Id"]
    inspected = docker_api.inspect_container(container)
    assert inspected["ExecIDs"]
    told += [inspected, docker_api.top(container), *map(docker_api.exec_inspect, inspected["ExecIDs"])]
    told.append(docker_api.volumes(filters={"label": f"jupyter-agents.user={user}"}))
    _, ended = await api("DELETE", f"runs/{run['id']}")
    assert ended["state"] == "cancelled"
    told += (await api("DELETE", "agents/a1"), engine_events(docker_api, container, began))
    socket.close()
    audited = [data for data in told if isinstance(data, dict) and "action" in data]
    assert [a["action"] for a in audited] == ["agent_created", "run_started", "run_ended", "agent_removed"]
    everything = "\n".join(map(str, [m for m in told if not isinstance(m, str) or '"prompt"' not in m]))
    assert "TOKEN" in everything
    assert len(caplog.records) > 20
    for text_ in (everything, caplog.text, jp_logging_stream.getvalue()):
        assert secret not in text_
    assert secret not in json.dumps(audited)


async def test_env_stays_0600_and_its_own(user: str, docker_api: docker.APIClient) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a1")
        home = "/workspace/agent-a1"
        # Whatever the agent has made of its .env, it is a private file again.
        for script in (
            "true",
            "rm .env",
            "ln -sf /etc/hostname .env",
            "rm .env; mkdir -p .env/x; chmod 0 .env",
            "rm -rf .env; mkfifo .env",
        ):
            assert try_in(docker_api, workspace, "a1", f"cd {home}; {script}")[0] == 0, script
            assert await asyncio.wait_for(workspace.set_env("a1", {"A": "1"}), 10) == ["A"], script
            uid = workspace.agent("a1").uid
            told = try_in(docker_api, workspace, "a1", f"stat -c '%u %a %F' {home}/.env; head -n 1 {home}/.env")
            assert told == (0, f"{uid} 600 regular file\nA='1'\n"), script


async def test_an_enormous_env_is_refused(user: str, docker_api: docker.APIClient, model: str) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a1")
        assert try_in(docker_api, workspace, "a1", "truncate -s 100G /workspace/agent-a1/.env")[0] == 0
        with pytest.raises(TooLarge):
            await workspace.env_names("a1")
        with pytest.raises(TooLarge):
            await workspace.start_run("a1", {"prompt": "[[say hello]]"})
        assert workspace.active_runs == []


async def test_simultaneous_changes_of_variables(user: str) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a1")
        await asyncio.gather(*(workspace.set_env("a1", {f"V{n}": str(n)}) for n in range(8)))
        assert await workspace.env_names("a1") == sorted(f"V{n}" for n in range(8))


async def test_agents_survive_the_server(user: str, model: str) -> None:
    async with serving(user) as workspace:
        run = await finish(workspace, "a1", "[[say hello]]")
        await workspace.set_env("a1", {"A": "1"})
        before = workspace.list_agents()
    async with serving(user) as workspace:
        await workspace.connect()
        assert [{**a, "created": 0} for a in workspace.list_agents()] == [{**a, "created": 0} for a in before]
        assert workspace.list_agents()[0]["created"] == pytest.approx(before[0]["created"], abs=2)
        assert workspace.agent("a1").env == ["A"]
        assert workspace.run(run.id).to_dict() == run.to_dict()
        with pytest.raises(BadRequest):
            workspace.agent("../a1")
        again = await end_of(workspace, await workspace.start_run("a1", {"prompt": "[[recall]]"}))
        assert again.continued


# --- what a hostile agent can do to those who look after it ---------------------------------------------------------


async def test_arguments_of_processes_are_no_lines_of_a_sample(user: str, docker_api: docker.APIClient) -> None:
    """dash's `echo` would make a line break of the `\\n`, and so an agent that is root's."""
    async with serving(user) as workspace:
        await workspace.create_agent("a1")
        forged = r"x\na\0040 0\0040 0\0040/workspace/agent-evil"
        script = f"tail /opt/jupyter-agents/agentctl supervise '{forged}' -f > /dev/null 2>&1 & echo $!"
        code, pid = try_in(docker_api, workspace, "a1", f"({script})")
        assert code == 0
        assert workspace.container
        sample = await workspace._look_into(workspace.container)
        assert int(pid) in {process.pid for process in sample.processes if process.parent == 1}
        assert sample.uids.keys() == {"a1"}
        assert not sample.supervisors


async def test_an_agent_that_closes_its_directory_can_be_stopped_and_used(
    user: str, model: str, docker_api: docker.APIClient
) -> None:
    async with serving(user) as workspace:
        await workspace.create_agent("a1")

        async def close() -> Run:
            run = await workspace.start_run("a1", {"prompt": "[[run chmod 000 .agent/* .agent .; sleep 60]]"})
            container = (await workspace.connect()).id
            mode = ("stat", "-c", "%a", "/workspace/agent-a1")
            await eventually(lambda: output(docker_api, container, *mode).strip() == "0")
            return run

        run = await close()
        assert (await end_of(workspace, await workspace.cancel(run.id))).state == "cancelled"
        assert text(await finish(workspace, "a1", "[[say open again]]")) == "open again"
        await close()
        await workspace.stop()
        assert [agent["id"] for agent in (await workspace.connect(), workspace.list_agents())[1]] == ["a1"]
        await workspace.remove_agent("a1")


async def test_an_agent_that_halts_what_it_is_asked_holds_up_nobody_else(
    user: str, docker_api: docker.APIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jupyter_agents.link.ANSWER_SECONDS", 2)
    async with serving(user) as workspace:
        for name in ("a1", "a2"):
            await workspace.create_agent(name)
        halting = "while :; do for p in $(grep -la '[a]gentctl.[gl]' /proc/[0-9]*/cmdline); do p=${p#/proc/}; "
        halting += "kill -STOP ${p%/*}; done; done"
        try_in(docker_api, workspace, "a1", f"({halting}) > /dev/null 2>&1 &")

        async def ask() -> None:
            for _ in range(50):  # it may come too late for some
                await workspace.env_names("a1")

        with pytest.raises(Stuck):
            await ask()
        assert await workspace.env_names("a2") == []
        workspace._lost()  # as a server does that was started anew
        await workspace.connect()
        assert workspace.agents.keys() == {"a1", "a2"}
        await workspace.stop()
        assert await workspace.env_names("a1") == []
