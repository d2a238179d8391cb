"""An agent's files over the real API: what goes through unchanged, and what can't be reached."""

from __future__ import annotations

import asyncio
import io
import json
import os
import tarfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import docker
import pytest
from conftest import Api
from helpers import containers, output

Fetch = Callable[..., Awaitable[Any]]
Shell = Callable[..., Awaitable[str]]


@pytest.fixture
def fetch(http_server_client: Any, jp_base_url: str, jp_auth_header: dict[str, str], model: str) -> Fetch:
    """A call for a file of `a1`, whose name is percent-encoded exactly once; answers tornado's response."""

    async def call(method: str, path: str | bytes, data: bytes | None = None, query: str = "", **headers: str) -> Any:
        return await http_server_client.fetch(
            f"{jp_base_url}jupyter-agents/agents/a1/files/{quote(path)}{query}",
            method=method,
            body=data,
            headers={**jp_auth_header, **headers},
            allow_nonstandard_methods=True,
            raise_error=False,
            request_timeout=60,
        )

    return call


@pytest.fixture
def shell(api: Api, docker_api: docker.APIClient, user: str, jp_asyncio_loop: Any) -> Shell:
    """Run a script in the directory of an agent as its uid. There are `a1` and `a2`."""

    async def create() -> None:
        for agent in ("a1", "a2"):
            assert (await api("POST", "agents", {"id": agent}))[0] == 201

    jp_asyncio_loop.run_until_complete(create())
    container = docker_api.containers(filters={"label": f"jupyter-agents.user={user}"})[0]["Id"]

    async def run(script: str, agent: str = "a1") -> str:
        uid = output(docker_api, container, "stat", "-c", "%u", f"/workspace/agent-{agent}").strip()
        script = f"cd /workspace/agent-{agent} && {{ {script}\n}}"
        return output(docker_api, container, "sh", "-c", script, user=f"{uid}:{uid}")

    return run


def reason(response: Any) -> tuple[int, str]:
    return response.code, json.loads(response.body)["reason"]


# --- names and contents ---------------------------------------------------------------------------------------------

NAMES = [
    "plain.txt",
    "with space",
    " around ",
    "-rf",
    "--help",
    "100%",
    "%2e%2e",
    "a%00b",
    "ünï 🚀.txt",
    "line\nbreak",
    "tab\tquote'\"`$(id)\\",
    "*?[x]",
    "#frag?query=1&x",
    ".hidden",
    "a..b",
    "...",
    "x" * 255,
    "deep/er/and/er",
    "semi;colon|pipe",
    "\u202ereversed",
]
CONTENT = bytes(range(256)) * 300 + b"\r\n\0"


async def test_names_and_contents_go_through_unchanged(fetch: Fetch, shell: Shell) -> None:
    for name in NAMES:
        stored = await fetch("PUT", name, CONTENT)
        assert stored.code == 201, (name, stored.body)
        entry = json.loads(stored.body)
        assert entry["path"] == name
        assert entry["name"] == name.rpartition("/")[2]
        assert (entry["type"], entry["size"]) == ("file", len(CONTENT))
        assert abs(entry["modified"] - time.time()) < 10
        got = await fetch("GET", name)
        assert (got.code, got.body) == (200, CONTENT), name
    listed = json.loads((await fetch("GET", "")).body)
    assert {e["name"] for e in listed} >= {n.partition("/")[0] for n in NAMES}
    assert all(e["path"] == e["name"] for e in listed)
    assert [e["name"] for e in listed] == sorted(e["name"] for e in listed)
    assert {e["type"] for e in listed if e["name"] == "deep"} == {"directory"}
    assert [e["path"] for e in json.loads((await fetch("GET", "deep/er/and")).body)] == ["deep/er/and/er"]
    got = await fetch("GET", "", query="?format=tar")
    with tarfile.open(fileobj=io.BytesIO(got.body)) as tar:
        held = {m.name.removeprefix("./"): m for m in tar if m.isreg()}
        assert set(held) == set(NAMES)
        content = tar.extractfile(held["line\nbreak"])
        assert content
        assert content.read() == CONTENT
    for name in NAMES:
        assert (await fetch("DELETE", name)).code == 204, name
        assert (await fetch("GET", name)).code == 404, name
    assert {e["name"] for e in json.loads((await fetch("GET", "")).body)} <= {"deep", ".env", ".agent"}


async def test_names_that_are_not_unicode(fetch: Fetch, shell: Shell) -> None:
    await shell("printf held > \"$(printf 'caf\\351')\"")
    listed = json.loads((await fetch("GET", "")).body)
    assert "caf\udce9" in [e["name"] for e in listed]
    assert (await fetch("GET", b"caf\xe9")).body == b"held"
    stored = await fetch("PUT", b"\xff\xfe", b"x")
    assert (stored.code, json.loads(stored.body)["name"]) == (201, "\udcff\udcfe")
    body = json.dumps({"path": "moved \udcff"}).encode()
    moved = await fetch("PATCH", b"caf\xe9", body, **{"Content-Type": "application/json"})
    assert (moved.code, json.loads(moved.body)["name"]) == (200, "moved \udcff")
    assert (await fetch("DELETE", b"\xff\xfe")).code == 204
    assert (await fetch("DELETE", b"moved \xff")).code == 204


async def test_overwriting_and_empty_files(fetch: Fetch, shell: Shell) -> None:
    for content in (b"long content", b"", b"new"):
        assert (await fetch("PUT", "x", content)).code == 201
        got = await fetch("GET", "x")
        assert (got.code, got.body) == (200, content)
    assert await shell("stat -c %a x") == "600\n"


async def test_download_headers(fetch: Fetch, shell: Shell) -> None:
    await fetch("PUT", 'é"; filename=evil.html', b"<script>")
    got = await fetch("GET", 'é"; filename=evil.html')
    assert got.headers["Content-Type"] == "application/octet-stream"
    assert got.headers["X-Content-Type-Options"] == "nosniff"
    assert got.headers["Content-Disposition"] == "attachment; filename*=UTF-8''%C3%A9%22%3B%20filename%3Devil.html"
    got = await fetch("GET", "", query="?format=tar")
    assert got.headers["Content-Type"] == "application/x-tar"
    assert got.headers["Content-Disposition"] == "attachment; filename*=UTF-8''a1.tar"


async def test_folders_and_moves(fetch: Fetch, shell: Shell) -> None:
    made = await fetch("PUT", "new/folder", query="?type=directory")
    assert made.code == 201, made.body
    assert json.loads(made.body)["type"] == "directory"
    await fetch("PUT", "new/folder/x", b"1")

    async def move(path: str, to: str) -> Any:
        body = json.dumps({"path": to}).encode()
        return await fetch("PATCH", path, body, **{"Content-Type": "application/json"})

    moved = await move("new/folder/x", "else where/-y")
    assert (moved.code, json.loads(moved.body)["path"]) == (200, "else where/-y")
    assert (await fetch("GET", "else where/-y")).body == b"1"
    assert reason(await move("new/folder/x", "z")) == (404, "unknown_file")
    assert (await move("new", "old")).code == 200
    await fetch("PUT", "z", b"2")
    assert reason(await move("z", "else where/-y")) == (409, "file_exists")
    assert reason(await move("z", "else where")) == (409, "file_exists")
    assert reason(await move("z", "../a2/z")) == (400, "bad_path")
    assert reason(await move("z", "z/below")) == (409, "not_a_file")
    assert reason(await move("z", "half\ud800")) == (400, "bad_path")
    assert reason(await move("old", "old/inside")) in [(409, "not_a_file"), (400, "failed")]
    assert reason(await fetch("PUT", "z", query="?type=directory")) == (409, "not_a_file")
    assert reason(await fetch("PUT", "old", b"x")) == (409, "not_a_file")
    assert reason(await fetch("PUT", "z/below", b"x")) == (409, "not_a_file")
    assert reason(await fetch("GET", "none")) == (404, "unknown_file")
    assert reason(await fetch("GET", "z", query="?format=tar")) == (404, "unknown_file")
    assert reason(await fetch("DELETE", "none")) == (404, "unknown_file")
    assert (await fetch("DELETE", "old")).code == 204
    assert await shell("ls -d old; cat z") == "ls: cannot access 'old': No such file or directory\n2"


# --- what can't be reached ------------------------------------------------------------------------------------------


async def test_paths_that_lead_out_are_refused(fetch: Fetch, shell: Shell) -> None:
    await shell("echo s3cr3t > notes", "a2")
    up = ["..", "../agent-a2/notes", "x/../../agent-a2/notes", "./..", "a//../b"]
    for path in (*up, "a\0b", "x" * 5000, "x" * 256, "é" * 128):
        for verb, data in (("GET", None), ("PUT", b"x"), ("DELETE", None)):
            assert reason(await fetch(verb, path, data)) == (400, "bad_path"), (verb, path)
    for path in ("/etc/passwd", "//etc/passwd"):  # always relative
        assert reason(await fetch("GET", path)) == (404, "unknown_file")
    for path in ("", ".", "/", "./."):
        assert reason(await fetch("DELETE", path)) == (400, "bad_path"), path
    assert await shell("cat notes", "a2") == "s3cr3t\n"


async def test_links_reach_only_what_the_agent_may_reach(fetch: Fetch, shell: Shell) -> None:
    await shell("echo s3cr3t > notes; mkdir sub; echo s3cr3t > sub/x; ls", "a2")
    await shell(
        "ln -s ../agent-a2 other; ln -s ../agent-a2/notes notes; ln -s /etc/shadow shadow; ln -s / root"
        "; ln -s /proc/1/environ environ; ln -s none broken; ln -s loop loop; echo mine > mine; ln -s mine mylink"
        "; mkdir d; ln -s d dlink"
    )
    for path in ("other/notes", "other/sub/x", "other", "notes", "shadow", "environ", "root/etc/shadow"):
        got = await fetch("GET", path)
        assert got.code in (400, 403, 404), (path, got.body)
        assert b"s3cr3t" not in got.body
        assert b"root:" not in got.body
        assert "reason" in json.loads(got.body)
    for path in ("other/planted", "root/etc/planted", "root/opt/jupyter-agents/agentctl"):
        put = await fetch("PUT", path, b"x")
        assert put.code in (400, 403, 404, 409), path
        assert "reason" in json.loads(put.body)
    for path in ("other/notes", "root/etc/passwd"):
        assert (await fetch("DELETE", path)).code >= 400, path
    assert (await fetch("GET", "mylink")).body == b"mine\n"
    kinds = {e["name"]: e["type"] for e in json.loads((await fetch("GET", "")).body)}
    links = {"mylink": "file", "dlink": "directory", "broken": "symlink", "loop": "symlink"}
    assert links.items() <= kinds.items()
    tar = (await fetch("GET", "", query="?format=tar")).body
    assert b"s3cr3t" not in tar
    assert (await fetch("DELETE", "dlink")).code == 204
    assert (await fetch("DELETE", "other")).code == 204
    assert (await fetch("DELETE", "broken")).code == 204
    assert await shell("ls -d d; ls", "a1") == "d\nd\nenviron\nloop\nmine\nmylink\nnotes\nroot\nshadow\n"
    assert await shell("cat notes sub/x", "a2") == "s3cr3t\ns3cr3t\n"


async def test_env_is_refused_under_every_name(api: Api, fetch: Fetch, shell: Shell) -> None:
    await api("PATCH", "agents/a1/env", {"SECRET": "s3cr3t"})
    await shell(
        "ln -s .env soft; ln .env hard; ln -s d dd; mkdir d; ln .env d/hard; ln -s ../.env d/soft; ln -s .. d/up"
    )
    for path in (".env", "./.env", "d/up/.env", "soft", "hard", "d/hard", "d/soft", "dd/hard", "//.env"):
        assert reason(await fetch("GET", path)) == (403, "protected_file"), path
        assert reason(await fetch("PUT", path, b"A=1")) == (403, "protected_file"), path
        assert reason(await fetch("DELETE", path)) == (403, "protected_file"), path
        body = json.dumps({"path": "plain"}).encode()
        moved = await fetch("PATCH", path, body, **{"Content-Type": "application/json"})
        assert reason(moved) == (403, "protected_file"), path
    for path in ("", "d", "dd", "d/up"):
        assert (await fetch("GET", path)).code == 200, path
        # Links in a tar would be its content.
        assert reason(await fetch("GET", path, query="?format=tar")) == (403, "protected_file"), path
    await shell("rm hard d/hard")
    for path in ("", "d", "dd", "d/up"):
        got = await fetch("GET", path, query="?format=tar")
        assert got.code == 200, path
        assert b"s3cr3t" not in got.body, path
    assert (await api("GET", "agents/a1/env"))[1] == ["SECRET"]


async def test_special_files_do_not_hang(fetch: Fetch, shell: Shell) -> None:
    await shell("mkfifo fifo; ln -s /dev/zero zero; ln -s /dev/stdin stdin; ln -s /proc/self/mem mem")
    await shell("python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")'")
    for path in ("fifo", "zero", "stdin", "sock"):
        got = await asyncio.wait_for(fetch("GET", path), 10)
        assert reason(got) == (409, "not_a_file"), path
    assert (await asyncio.wait_for(fetch("GET", "mem"), 10)).code < 500
    kinds = {e["name"]: e["type"] for e in json.loads((await fetch("GET", "")).body)}
    assert (kinds["fifo"], kinds["zero"], kinds["sock"]) == ("other", "other", "other")
    put = await asyncio.wait_for(fetch("PUT", "fifo", b"x"), 10)  # takes its place
    assert put.code == 201
    assert (await fetch("GET", "fifo")).body == b"x"
    assert (await asyncio.wait_for(fetch("GET", "", query="?format=tar"), 10)).code == 200


async def test_unreadable_and_unwritable(fetch: Fetch, shell: Shell) -> None:
    await shell("mkdir dir ro; echo x | tee closed dir/x ro/x; chmod 0 closed dir; chmod 500 ro")
    for path in ("closed", "dir", "dir/x"):
        got = await fetch("GET", path)
        assert 400 <= got.code < 500, path
        assert "reason" in json.loads(got.body), path
    assert reason(await fetch("PUT", "ro/new", b"x")) == (403, "protected_file")
    assert reason(await fetch("PUT", "ro/x", b"x")) == (403, "protected_file")
    for path in ("closed", "dir", "ro"):
        assert (await fetch("DELETE", path)).code == 204, path


# --- uploads --------------------------------------------------------------------------------------------------------


async def send(port: int, head: str, *pieces: bytes) -> bytes:
    """A raw request, cut off after the last piece; what was answered until then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.replace("\n", "\r\n").encode() + b"\r\n")
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.3)
    if pieces:
        writer.close()
        return b""
    answer = await asyncio.wait_for(reader.read(2000), 10)
    writer.close()
    return answer


async def test_upload_that_is_cut_off(
    fetch: Fetch, shell: Shell, jp_http_port: int, jp_base_url: str, jp_auth_header: dict[str, str]
) -> None:
    await fetch("PUT", "x", b"old")
    head = f"PUT {jp_base_url}jupyter-agents/agents/a1/files/NAME HTTP/1.1\nHost: localhost\n"
    head += "".join(f"{k}: {v}\n" for k, v in jp_auth_header.items())
    for name in ("x", "new", "folder/new"):
        whole = head.replace("NAME", name) + "Content-Length: 300000\n"
        await send(jp_http_port, whole, b"a" * 100_000, b"b" * 100_000)
        _, writer = await asyncio.open_connection("127.0.0.1", jp_http_port)
        writer.write(whole.replace("\n", "\r\n").encode() + b"\r\n")
        await writer.drain()
        writer.close()  # before there is an upload
    async with asyncio.timeout(10):
        left = "find . -name '.upload*' -o -name new; grep -la '[a]gentctl.put' /proc/[0-9]*/cmdline 2>/dev/null"
        while await shell(left):
            await asyncio.sleep(0.2)
    assert (await fetch("GET", "x")).body == b"old"
    answer = await send(jp_http_port, head.replace("NAME", "x") + "Content-Length: 99999999999999\n")
    assert answer.startswith(b"HTTP/1.1 413 "), answer
    assert b"too_large" in answer
    assert (await fetch("GET", "x")).body == b"old"


async def test_half_a_folder_is_not_taken_for_a_whole_one(
    shell: Shell, jp_http_port: int, jp_base_url: str, jp_auth_header: dict[str, str], user: str, docker_api: Any
) -> None:
    await shell("truncate -s 300M zeros")
    reader, writer = await asyncio.open_connection("127.0.0.1", jp_http_port)
    head = f"GET {jp_base_url}jupyter-agents/agents/a1/files?format=tar HTTP/1.1\nHost: localhost\n"
    head += "".join(f"{k}: {v}\n" for k, v in jp_auth_header.items()) + "\n"
    writer.write(head.replace("\n", "\r\n").encode())
    answer = await reader.readexactly(2**20)
    assert b"200 OK" in answer and b"chunked" in answer
    for container in containers(docker_api, user):
        docker_api.remove_container(container["Id"], force=True)
    while chunk := await reader.read(2**20):
        answer = (answer + chunk)[-100:]
    assert not answer.endswith(b"\r\n0\r\n\r\n")
    writer.close()


async def test_upload_needs_a_length(
    fetch: Fetch, shell: Shell, jp_http_port: int, jp_base_url: str, jp_auth_header: dict[str, str]
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", jp_http_port)
    head = f"PUT {jp_base_url}jupyter-agents/agents/a1/files/x HTTP/1.1\r\nHost: localhost\r\n"
    head += "".join(f"{k}: {v}\r\n" for k, v in jp_auth_header.items())
    writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n".encode())
    assert b" 411 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    assert reason(await fetch("GET", "x")) == (404, "unknown_file")


class TestLargest:
    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any]) -> dict[str, Any]:
        return {**jp_server_config, "Workspaces": {"max_upload": 3 * 2**20}}

    async def test_upload_too_large(self, fetch: Fetch, shell: Shell) -> None:
        assert (await fetch("PUT", "x", b"x" * 3 * 2**20)).code == 201
        told = await fetch("PUT", "x", b"y" * (3 * 2**20 + 1))
        assert reason(told) == (413, "too_large")
        assert (await fetch("GET", "x")).body == b"x" * 3 * 2**20


def peak_mb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc to see the peak of memory")
def test_big_files_need_no_memory(server: Any, tmp_path: Path) -> None:
    size = 300 * 2**20
    with server.session() as session:
        assert session.post(server.url("agents"), json={"id": "big"}).status_code == 201
        (tmp_path / "small").write_bytes(b"x")
        with (tmp_path / "small").open("rb") as file:
            session.put(server.url("agents/big/files/small"), data=file)
        before = peak_mb(server.pid)
        with (tmp_path / "big").open("wb") as file:
            file.truncate(size)
        with (tmp_path / "big").open("rb") as file:
            stored = session.put(server.url("agents/big/files/big"), data=file)
        assert (stored.status_code, stored.json()["size"]) == (201, size)
        for query in ("", "?format=tar"):
            path = "agents/big/files/" + ("" if query else "big")
            with session.get(server.url(path + query), stream=True) as got:
                assert got.status_code == 200
                assert sum(map(len, got.iter_content(2**20))) >= size
        # A reader that has had enough.
        with session.get(server.url("agents/big/files/big"), stream=True) as got:
            next(got.iter_content(1000))
        assert peak_mb(server.pid) - before < 100
        assert session.delete(server.url("agents/big")).status_code == 204
