from __future__ import annotations

import ast
import asyncio
import io
import json
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from api_server import TOKEN, Api, calls, says, server_file, serving
from jupyter_client.asynchronous.client import AsyncKernelClient

from jupyter_agents import client as client_module
from jupyter_agents.client import AgentsError, Client, _lines

RUN = "20250101-000000-00000000"


pytest_plugins = ["client_fixtures"]


def test_workspace_and_agents(client: Client) -> None:
    assert client.workspace()["state"] == "ready"
    client.create_agent("amy")
    assert [agent["id"] for agent in client.agents()] == ["amy", "bot"]
    assert client.agent("bot")["state"] == "idle"
    client.remove_agent("bot")
    with pytest.raises(AgentsError, match=r"There is no agent bot; create it first\.") as caught:
        client.agent("bot")
    assert (caught.value.reason, caught.value.status) == ("unknown_agent", 404)


def test_env(served: Api, client: Client) -> None:
    assert client.set_env("bot", {"A": "1", "B": "ü=2"}) == ["A", "B"]
    assert client.set_env("bot", {"A": None}) == ["B"] == client.env("bot")
    assert served.env["bot"] == {"B": "ü=2"}


def test_files_go_and_come_back(client: Client, tmp_path: Path) -> None:
    (tmp_path / "ä b#?.txt").write_bytes(b"\0data")
    (tmp_path / "empty").touch()
    assert client.put("bot", tmp_path / "ä b#?.txt") == "ä b#?.txt"
    assert client.put("bot", str(tmp_path / "empty"), "sub/") == "sub/empty"
    assert client.put("bot", b"bytes", "sub/b") == "sub/b"
    assert client.read("bot", "ä b#?.txt") == b"\0data"
    assert sorted(entry["path"] for entry in client.files("bot", "sub")) == ["sub/b", "sub/empty"]
    got = client.get("bot", "sub/b", tmp_path)
    assert (got, got.read_bytes()) == (tmp_path / "b", b"bytes")
    client.delete("bot", "sub/b")
    with pytest.raises(AgentsError, match="no file sub/b"):
        client.read("bot", "sub/b")


def test_a_download_replaces_the_file_and_no_other(client: Client, tmp_path: Path) -> None:
    for name in ("f", "f.part", "f~"):
        (tmp_path / name).write_text("mine")
    client.put("bot", b"new", "f")
    client.get("bot", "f", tmp_path)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"f": "new", "f.part": "mine", "f~": "mine"}


def test_folders_go_and_come_back(client: Client, tmp_path: Path) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "x").write_text("x")
    (tmp_path / "tree" / "y").write_text("y")
    assert client.put("bot", tmp_path / "tree") == "tree"
    assert client.read("bot", "tree/deep/x") == b"x"
    got = client.get("bot", "tree", tmp_path / "copy")
    assert sorted(str(f.relative_to(got)) for f in got.rglob("*")) == ["deep", "deep/x", "y"]


def tar_of(*members: tuple[str, bytes, str]) -> bytes:
    """A tar of (name, type, content or target of a link)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, held in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(held)
            else:
                info.linkname = held
            tar.addfile(info, io.BytesIO(held.encode()) if kind == tarfile.REGTYPE else None)
    return out.getvalue()


def unpack(client: Client, monkeypatch: pytest.MonkeyPatch, tar: bytes, target: Path) -> None:
    """Get a folder that comes as this tar."""
    client.put("bot", b"", "sub/f")
    monkeypatch.setattr(client_module, "_body", lambda answer: iter([tar]))
    client.get("bot", "sub", target)


def test_links_out_of_a_folder_are_left_out(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reg, sym, hard = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
    outside = tmp_path / "outside"
    outside.write_text("mine")
    tar = tar_of(
        ("bin/python", sym, "/usr/bin/python3"),
        ("bin/x", reg, "x"),
        ("bin/ok", sym, "../bin/x"),
        ("same", hard, "bin/x"),
        ("up", sym, "../outside"),
        ("d/root", sym, ".."),
        ("trick", sym, "d/root/../outside"),
        ("d/e/near", sym, "../x"),
        ("copied", hard, "d/e/near"),
        ("bin/fifo", tarfile.FIFOTYPE, ""),
        ("last", reg, "last"),
    )
    with pytest.warns(UserWarning, match=r"5 files were left out.*'bin/python', 'up', 'trick', 'copied'"):
        unpack(client, monkeypatch, tar, tmp_path / "copy")
    got = sorted(str(f.relative_to(tmp_path / "copy")) for f in (tmp_path / "copy").rglob("*") if not f.is_dir())
    assert got == ["bin/ok", "bin/x", "d/e/near", "last", "same"]
    assert (tmp_path / "copy/bin/ok").read_text() == "x"
    assert outside.read_text() == "mine"


def test_a_damaged_folder_is_told_in_a_sentence(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AgentsError, match="came damaged"):
        unpack(client, monkeypatch, b"x" * 1024, tmp_path / "copy")


def test_a_folder_is_no_file_and_a_file_no_folder(client: Client) -> None:
    client.put("bot", b"", "sub/f")
    with pytest.raises(AgentsError, match="sub is a folder"):
        client.read("bot", "sub")
    with pytest.raises(AgentsError, match="sub/f is a file"):
        client.files("bot", "sub/f")


def test_a_failed_download_leaves_what_was_there(client: Client, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(AgentsError):
        client.get("bot", "f", tmp_path / "f")
    assert [f.read_text() for f in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("path", ["../x", "a/../../x", ".."])
def test_a_path_cannot_climb(served: Api, client: Client, path: str) -> None:
    asked = len(served.seen)
    with pytest.raises(AgentsError, match=r"'\.\.'"):
        client.read("bot", path)
    assert len(served.seen) == asked


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b?c"])
def test_a_name_cannot_be_another_address(served: Api, client: Client, name: str) -> None:
    with pytest.raises(AgentsError):
        client.agent(name)
    assert "x" not in served.agents
    assert all("/agents/" in uri or uri.endswith("/agents") for _, uri, _ in served.seen)


def test_a_run_from_start_to_end(served: Api, client: Client) -> None:
    run = client.start_run("bot", "say hello", model="m", max_turns=None)
    assert served.requests == [{"prompt": "say hello", "model": "m"}]
    assert run.wait(10).status == "succeeded"
    assert (run.text, str(run), run.cost) == ("Done.", "Done.", 0.0123)
    assert run.result
    assert run.result["turns"] == 2
    assert [event["type"] for event in run.events()] == ["run_end"]
    assert run.files() == []
    assert client.runs("bot") == client.runs() == [run.info]
    assert repr(run) == f"<run {RUN} of bot: succeeded>"
    assert client.handle(RUN).check().id == RUN


def test_waiting(served: Api, client: Client) -> None:
    served.script = lambda run: None
    run = client.start_run("bot", "sleep")
    assert (run.status, run.text, run.cost, run.result) == ("running", "", None, None)
    with pytest.raises(TimeoutError, match=r"still running after 0\.3 s"):
        run.wait(0.3)
    threading.Timer(0.2, served.end, [run.id, "failed"]).start()
    began = time.monotonic()
    assert run.wait().status == "failed"
    assert time.monotonic() - began < 2
    with pytest.raises(AgentsError, match=r"It failed; try again\."):
        run.check()


def test_cancelling(served: Api, client: Client) -> None:
    served.script = lambda run: None
    run = client.start_run("bot", "sleep").cancel()
    assert run.status == "cancelled"
    with pytest.raises(AgentsError, match="cancelled"):
        run.check()


def test_events_from_any_number(served: Api, client: Client) -> None:
    served.script = lambda run: (served.add(run, *calls("Bash", {}), *says("x" * 100_000)), served.end(run))[0]
    run = client.start_run("bot", "go").wait()
    events = list(run.events())
    assert [event["type"] for event in events] == ["assistant", "user", *["stream_event"] * 2, "assistant", "run_end"]
    assert list(run.events(since=4)) == events[4:]
    assert list(run.events(since=99)) == []


@pytest.mark.parametrize("how", ["events", "watch"])
def test_following_goes_on_after_the_connection_broke(served: Api, client: Client, how: str) -> None:
    served.script = lambda run: None
    served.cut_after = [3, 3, 7]
    run = client.start_run("bot", "count")
    for n in range(10):
        threading.Timer(0.05 * n, served.add, [run.id, {"n": n}]).start()
    threading.Timer(0.8, served.end, [run.id]).start()
    if how == "events":
        got = list(run.events(follow=True))
    else:
        messages = [m for m in client.watch(run.id, tick=0.1) if m]
        got = [event for m in messages if m["type"] == "events" for event in m["events"]]
        assert messages[-1] == {"type": "end", "run": run.id, "next": 11}
    assert got == [*({"n": n} for n in range(10)), {"type": "run_end", "exit_code": 0, "reason": ""}]
    assert served.cut_after == []


@pytest.mark.parametrize("how", ["events", "watch"])
def test_following_goes_on_after_the_server_restarted(how: str) -> None:
    with serving() as first:
        first.script = lambda run: first.add(run, {"n": 0})
        client = Client(first.url, TOKEN)
        client.create_agent("bot")
        run = client.start_run("bot", "go")
        stream: Any = run.events(follow=True) if how == "events" else client.watch(run.id)
        kept = (first.agents, first.runs, {run.id: [{"n": 0}, {"n": 1}]})
        while next(stream) not in ({"n": 0}, {"type": "events", "run": run.id, "since": 0, "events": [{"n": 0}]}):
            pass
    with serving(int(first.url.split(":")[2].split("/")[0])) as second:
        second.agents, second.runs, second.events = kept
        second.end(run.id)
        rest = [event for event in stream if event and (how == "events" or event["type"] == "events")]
    events = rest if how == "events" else [event for message in rest for event in message["events"]]
    assert [event.get("n") for event in events] == [1, None]


@pytest.mark.parametrize("how", ["events", "watch"])
def test_following_gives_up_in_the_end(how: str) -> None:
    with serving() as gone:
        client = Client(gone.url, TOKEN)
    with pytest.raises(AgentsError, match="can't be reached; start it again") as caught:
        list(client.events(RUN, follow=True, patience=0.3) if how == "events" else client.watch(patience=0.3))
    assert caught.value.reason == "server_gone"


def test_watching_an_unknown_run(client: Client) -> None:
    stream = client.watch("20250101-000000-ffffffff")
    assert next(m for m in stream if m and m["type"] == "error")["reason"] == "unknown_run"


def test_watching_ticks(client: Client) -> None:
    stream = client.watch(tick=0.05)
    assert [m and m["type"] for m in (next(stream), next(stream), next(stream), next(stream))] == [
        "state",
        "memory",
        None,
        None,
    ]


def test_lines_are_whole_however_they_arrive() -> None:
    assert list(_lines(iter([b"a\nb", b"c", b"\n\nd\ncut"]))) == [b"a", b"bc", b"", b"d"]
    big = [b"x" * 2**16] * 512
    began = time.process_time()
    assert len(next(_lines(iter([*big, b"\n"])))) == 2**25
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("status", "body", "reason", "sentence"),
    [
        (404, "<html>", "no_extension", "doesn't have the jupyter_agents extension"),
        (403, '{"message": "Forbidden", "reason": null}', "not_authenticated", "doesn't accept this kernel's token"),
        (302, "", "not_authenticated", "doesn't accept this kernel's token"),
        (500, "<html>", "server_error", r"failed \(HTTP 500\); its log says why"),
        (502, '{"message": "Bad gateway"}', "server_error", r"failed \(HTTP 502: Bad gateway\)"),
        (200, "no json", "server_error", "not that of jupyter_agents"),
        (503, '{"message": "Start Docker.", "reason": "engine_unavailable"}', "engine_unavailable", "^Start Docker.$"),
    ],
)
def test_refusals(served: Api, client: Client, status: int, body: str, reason: str, sentence: str) -> None:
    served.refuse = status, body
    with pytest.raises(AgentsError, match=sentence) as caught:
        client.workspace()
    assert caught.value.reason == reason


def test_an_error_is_one_sentence_with_its_command() -> None:
    assert AgentsError("Start it.", "x", "dockerd")._render_traceback_() == ["Start it.", "    dockerd"]


def test_the_token_goes_in_a_header_and_nowhere_else(
    served: Api, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    client = Client(served.url, TOKEN)
    client.create_agent("bot")
    client.start_run("bot", "x").wait()
    next(client.watch())
    assert all(TOKEN not in uri and headers["Authorization"] == f"token {TOKEN}" for _, uri, headers in served.seen)
    wrong = Client(served.url, "wrong-token")
    for call in (wrong.workspace, lambda: next(wrong.watch())):
        with pytest.raises(AgentsError) as caught:
            call()
        assert "wrong-token" not in f"{caught.value!r} {wrong!r} {wrong} {caught.value.__context__!r}"
    assert TOKEN not in "".join(capfd.readouterr())


# --- finding the server -----------------------------------------------------------------------------------------


def test_the_kernels_own_server_is_found(home: Path, served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as other:
        server_file(home, other, 99999999)
        server_file(home, served, 12345678)
        (home / "JUPYTER_RUNTIME_DIR" / "jpserver-1.json").write_text("{")
        monkeypatch.setenv("JPY_PARENT_PID", "12345678")
        assert Client.discover().url == served.url
        assert other.seen == []


def test_a_terminals_own_server_is_found(home: Path, served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    server_file(home, served, 12345678)
    monkeypatch.setenv("JUPYTER_SERVER_URL", served.url)
    assert Client.discover().url == served.url


def test_a_server_on_all_addresses_is_reached_on_loopback(
    home: Path, served: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(served.url.split(":")[2].split("/")[0])
    server_file(home, served, 12345678, url="http://no-such-host/", hostname="0.0.0.0", port=port, base_url="/base/")
    monkeypatch.setenv("JPY_PARENT_PID", "12345678")
    assert Client.discover().url == served.url


def test_a_password_servers_kernel_has_the_token_in_its_environment(
    home: Path, served: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_file(home, served, 12345678, token="", password=True)
    monkeypatch.setenv("JPY_PARENT_PID", "12345678")
    with pytest.raises(AgentsError, match="doesn't accept this kernel's token"):
        Client.discover()
    monkeypatch.setenv("JUPYTER_AGENTS_TOKEN", TOKEN)
    assert Client.discover().url == served.url


def test_the_command_line_takes_any_server_that_has_the_extension(home: Path, served: Api) -> None:
    with serving() as other:
        other.refuse = 404, "<html>"
        server_file(home, served, 12345678)
        time.sleep(0.02)
        server_file(home, other, 99999999)  # the newest is asked first
        assert Client.discover(any_server=True).url == served.url
        assert any(method == "GET" for method, _, _ in other.seen)


KERNEL = """
import time
from jupyter_agents.client import Client
client = Client.discover()
assert Client.discover() is client
print(client.url, flush=True)
time.sleep(60)
"""


def test_without_a_server_a_private_one_lives_as_long_as_the_kernel(home: Path) -> None:
    kernel = subprocess.Popen([sys.executable, "-c", KERNEL], stdout=subprocess.PIPE, text=True)
    try:
        assert kernel.stdout
        url = kernel.stdout.readline().strip()
        [info_file] = (home / "JUPYTER_RUNTIME_DIR").glob("jpserver-*.json")
        info = json.loads(info_file.read_text())
        assert url == info["url"]
        assert url.startswith("http://127.0.0.1:")
        assert len(info["token"]) == 48
        command = Path(f"/proc/{info['pid']}/cmdline").read_bytes() + Path(f"/proc/{info['pid']}/environ").read_bytes()
        assert info["token"].encode() not in command
        assert Client(url, info["token"]).workspace()["limits"]
        with pytest.raises(AgentsError, match="token"):
            Client(url).workspace()
    finally:
        kernel.send_signal(signal.SIGKILL)
        kernel.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{info['pid']}/cmdline").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not info_file.exists()


def test_a_private_server_that_cannot_start_says_why(home: Path) -> None:
    (home / "JUPYTER_CONFIG_DIR" / "jupyter_server_config.py").write_text("raise SystemExit('Broken settings.')")
    code = "from jupyter_agents.client import Client\ntry:\n Client.discover()\nexcept Exception as e: print(e)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "a private one could not be started: Broken settings." in told


# --- real servers -----------------------------------------------------------------------------------------------

ASK = """
from jupyter_agents.client import Client
client = Client.discover()
limits = client.workspace()["limits"]["runs"]
try:
    client.create_agent("Bad Name")
except Exception as error:
    told = client.url, limits, error.reason
"""

SERVERS = {
    "token": [],
    "own token": ["--IdentityProvider.token=known-to-the-user"],
    "password": ["--PasswordIdentityProvider.hashed_password=argon2:x"],
    "nothing": ["--IdentityProvider.token=", "--PasswordIdentityProvider.hashed_password="],
    "all addresses": ["--ServerApp.ip=0.0.0.0", "--ServerApp.base_url=/some/where"],
}


@pytest.mark.parametrize("kind", SERVERS)
def test_a_kernel_finds_its_own_server_and_may_use_it(home: Path, kind: str) -> None:
    from jupyter_server.auth import passwd

    options = [option.replace("argon2:x", passwd("pw")) for option in SERVERS[kind]]
    options += ["--ServerApp.port=0", "--ServerApp.open_browser=False", "--ServerApp.allow_root=True"]
    options += ["--ServerApp.jpserver_extensions=jupyter_agents=True", f"--ServerApp.root_dir={home}"]
    server = subprocess.Popen([sys.executable, "-m", "jupyter_server", *options], stderr=subprocess.PIPE, text=True)
    try:
        info_file = home / "JUPYTER_RUNTIME_DIR" / f"jpserver-{server.pid}.json"
        info = wait_for_server(info_file)
        connection = start_kernel(info, password="pw" if kind == "password" else "")
        reply = asyncio.run(ask(home / "JUPYTER_RUNTIME_DIR" / f"kernel-{connection}.json"))
        assert reply["status"] == "ok", reply
        url, *told = ast.literal_eval(reply["user_expressions"]["told"]["data"]["text/plain"])
        assert f":{info['port']}/" in url
        assert told == [3, "bad_agent_id"]
    finally:
        server.send_signal(signal.SIGTERM)
        log = server.communicate(timeout=20)[1]
    assert "Traceback" not in log


async def ask(connection: Path) -> Any:
    """What a kernel replies to ASK."""
    kernel = AsyncKernelClient()
    kernel.load_connection_file(str(connection))
    kernel.start_channels()
    try:
        kernel.execute(ASK, user_expressions={"told": "told"})
        return (await kernel.get_shell_msg(timeout=60))["content"]
    finally:
        kernel.stop_channels()


def wait_for_server(info_file: Path, seconds: float = 30) -> dict[str, Any]:
    """What the server says of itself, once it listens."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            info = json.loads(info_file.read_text())
            socket.create_connection(("127.0.0.1", info["port"])).close()
        except (OSError, ValueError):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return dict(info)


def start_kernel(info: dict[str, Any], password: str) -> str:
    """Start a kernel as a browser would: with the token or by logging in."""
    import requests

    url = f"http://127.0.0.1:{info['port']}{info['base_url']}"
    with requests.Session() as session:
        if info["token"]:
            session.headers["Authorization"] = f"token {info['token']}"
        session.get(f"{url}login")
        xsrf = session.cookies.get("_xsrf", "")
        if password:
            session.post(f"{url}login", data={"password": password, "_xsrf": xsrf}, allow_redirects=False)
        xsrf = session.cookies.get("_xsrf", "") or xsrf
        if not (info["token"] or password):
            xsrf = "00"
            session.cookies.set("_xsrf", xsrf)
        answer = session.post(f"{url}api/kernels", json={}, headers={"X-XSRFToken": xsrf})
        answer.raise_for_status()
        return str(answer.json()["id"])
