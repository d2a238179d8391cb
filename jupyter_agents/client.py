"""Client of the API for kernels, the command line and scripts: plain, synchronous calls.

`Client.discover()` finds the Jupyter server that this kernel belongs to, or starts a private one.
"""

from __future__ import annotations

import atexit
import io
import itertools
import json
import os
import secrets
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import requests
import urllib3
import websocket
from jupyter_core.paths import jupyter_runtime_dir

JSON = dict[str, Any]
CHUNK = 1 << 18
STATES = {  # of an ended run, as words for a person
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "was cancelled",
    "timed_out": "ran out of time",
    "oom_killed": "ran out of memory",
    "lost": "was lost",
}


class AgentsError(Exception):
    """What went wrong and what to do, in one sentence, mostly the server's own.

    `reason` is a stable word, `command` a shell command that mends it, `status` the HTTP status (0: no answer).
    IPython shows the sentence alone, without a traceback.
    """

    def __init__(self, message: str, reason: str = "", command: str | None = None, status: int = 0):
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.command = command
        self.status = status

    def _render_traceback_(self) -> list[str]:
        return [self.message] + ([f"    {self.command}"] if self.command else [])


class Client:
    """The API of one server. Every method raises `AgentsError` when the server refuses or can't be reached.

    `url` is the Jupyter server's, with its base URL. The token is sent in a header and shown nowhere.
    Times are seconds since the epoch, sizes are bytes; the records are those of openapi.yaml.
    """

    def __init__(self, url: str, token: str = "", verify: bool = True):
        self.url = url.rstrip("/") + "/"
        self._verify = verify
        self._session = requests.Session()
        # A proxy from the environment would get to see the token, and a .netrc would replace it.
        self._session.trust_env = False
        self._session.verify = verify
        if not verify:
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        if token:
            self.headers = {"Authorization": f"token {token}"}
        else:  # a server without authentication still asks for what it gives to browsers: a cookie, sent twice
            xsrf = secrets.token_hex(16)
            self.headers = {"X-XSRFToken": xsrf, "Cookie": f"_xsrf={xsrf}"}

    def __repr__(self) -> str:
        return f"<Client of {self.url}>"

    @classmethod
    def discover(cls, any_server: bool = False) -> Client:
        """Client of the server that this process belongs to; else of a private one, which ends with this process.

        `any_server` also takes another running server of this user, where its token is known (the command line does).
        """
        for info in sorted(_servers(), key=_is_ours, reverse=True):
            ours = _is_ours(info)
            if not (ours or any_server):
                break
            # On a Hub the server has no token of its own; its extension gives the Hub's to its kernels.
            token = info.get("token") or (os.environ.get("JUPYTER_AGENTS_TOKEN", "") if ours else "")
            client = cls(_address(info), token, verify=False)
            try:
                client._request("GET", "workspace", timeout=None if ours else (2, 10))
            except AgentsError as error:
                # A file of a dead server, whose process number has come round again, leads to no answer.
                if ours and error.status:
                    raise
                continue
            return client
        return _private_server()

    # --- workspace and agents -----------------------------------------------------------------------------------

    def workspace(self) -> JSON:
        """State, limits and memory; starts nothing."""
        return self._object("GET", "workspace")

    def start_workspace(self) -> JSON:
        return self._object("POST", "workspace")

    def choose_image(self, image: str) -> JSON:
        """Go on with the same files in another of the workspace's `images`, while no run is active."""
        return self._object("POST", "workspace", body={"image": image})

    def stop_workspace(self, volume: bool = False) -> None:
        """Cancel all runs and remove the container; `volume` deletes all files too."""
        self._request("DELETE", "workspace", params={"volume": "1"} if volume else None)

    def agents(self) -> list[JSON]:
        return self._list("GET", "agents")

    def agent(self, agent: str) -> JSON:
        return self._object("GET", _join("agents", agent))

    def create_agent(self, agent: str) -> JSON:
        return self._object("POST", "agents", body={"id": agent})

    def remove_agent(self, agent: str) -> None:
        """Cancel its run and delete its directory."""
        self._request("DELETE", _join("agents", agent))

    def env(self, agent: str) -> list[str]:
        """Names of its variables; values never come back."""
        return self._list("GET", _join("agents", agent, "env"))

    def set_env(self, agent: str, variables: dict[str, str | None]) -> list[str]:
        """Set variables, unset those that are None; the names that there are then."""
        return self._list("PATCH", _join("agents", agent, "env"), body=variables)

    def diff(self, agent: str) -> str:
        """What its last run changed, as a unified diff."""
        return self._request("GET", _join("agents", agent, "diff")).content.decode("utf-8", "replace")

    # --- files --------------------------------------------------------------------------------------------------

    def files(self, agent: str, path: str = "") -> list[JSON]:
        """Entries of a folder of the agent."""
        with self._request("GET", _file(agent, path), stream=True) as answer:
            if not _is_json(answer):
                raise AgentsError(f"{path} is a file, not a folder.", "not_a_folder")
            return list(answer.json())

    def read(self, agent: str, path: str) -> bytes:
        """A file's content."""
        with self._open(agent, path) as answer:
            return answer.content

    def get(self, agent: str, path: str, destination: str | Path = ".") -> Path:
        """Copy a file or folder of the agent here, into `destination` if that is a folder. Returns where it is.

        Warns of links that lead out of the folder: they are left out.
        """
        target = Path(destination).expanduser()
        if target.is_dir() and path.strip("/."):
            target /= path.rstrip("/").rsplit("/", 1)[-1]
        with self._request("GET", _file(agent, path), stream=True) as answer:
            if _is_json(answer):
                return self._get_folder(agent, path, target)
            part = target.with_name(f".{secrets.token_hex(8)}.part")  # no name that the user may have given
            try:
                with part.open("xb") as file:
                    for data in _body(answer):
                        file.write(data)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
        return target

    def _get_folder(self, agent: str, path: str, target: Path) -> Path:
        left_out: list[str] = []

        def admit(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
            try:
                if _leads_out(member, folder):
                    raise tarfile.LinkOutsideDestinationError(member, member.linkname)
                return tarfile.data_filter(member, folder)
            except (tarfile.FilterError, OSError, ValueError):  # also for names that can't be here
                left_out.append(member.name)
                return None

        # tarfile reads backwards a little, which a network stream can't
        with tempfile.TemporaryFile() as file:
            with self._request("GET", _file(agent, path), params={"format": "tar"}, stream=True) as answer:
                for data in _body(answer):
                    file.write(data)
            file.seek(0)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    tar.extractall(target, filter=admit)  # noqa: S202 - stricter than the filter `data`
            except tarfile.TarError as error:
                raise AgentsError(
                    f"The folder came damaged ({error}), so that {target} lacks files; try again.", "server_error"
                ) from None
        if left_out:
            were = "1 file was" if len(left_out) == 1 else f"{len(left_out)} files were"
            names = ", ".join(repr(name.removeprefix("./")) for name in left_out[:5])
            more = ", …" if len(left_out) > 5 else ""
            warnings.warn(
                f"{were} left out, being links out of the folder or no ordinary files: {names}{more}", stacklevel=3
            )
        return target

    def put(self, agent: str, source: str | Path | bytes | IO[bytes], path: str = "") -> str:
        """Copy a file or folder from here (bytes and open files too) to `path` of the agent. Returns the path there.

        Without a path, or with one that ends in `/`, it keeps its name.
        """
        if isinstance(source, (str, Path)):
            here = Path(source).expanduser()
            if not path or path.endswith("/"):
                path += here.resolve().name
            if here.is_dir():
                for file in sorted(f for f in here.rglob("*") if f.is_file()):
                    self.put(agent, file, f"{path}/{file.relative_to(here).as_posix()}")
                return path
            with here.open("rb") as opened:
                return self.put(agent, opened, path)
        if isinstance(source, bytes):
            # requests sends an empty file in chunks, without the length that the server asks for
            source = io.BytesIO(source)
        empty = source.seek(0, io.SEEK_END) == 0
        source.seek(0)
        self._request("PUT", _file(agent, path), data=b"" if empty else source, timeout=(5, None))
        return path

    def delete(self, agent: str, path: str) -> None:
        """Delete a file, or a folder with all it holds."""
        self._request("DELETE", _file(agent, path))

    def _open(self, agent: str, path: str) -> requests.Response:
        answer = self._request("GET", _file(agent, path), stream=True)
        if _is_json(answer):
            answer.close()
            raise AgentsError(f"{path} is a folder, not a file.", "not_a_file")
        return answer

    # --- runs ---------------------------------------------------------------------------------------------------

    def start_run(self, agent: str, prompt: str, **options: Any) -> RunHandle:
        """Start a run; options are those of the API's RunRequest, where None means unset."""
        body = {"prompt": prompt, **{name: value for name, value in options.items() if value is not None}}
        return RunHandle(self, self._object("POST", _join("agents", agent, "runs"), body=body))

    def runs(self, agent: str | None = None) -> list[JSON]:
        """Runs, newest first."""
        return self._list("GET", "runs", params={"agent": agent} if agent else None)

    def run(self, run: str) -> JSON:
        return self._object("GET", _join("runs", run))

    def handle(self, run: str) -> RunHandle:
        return RunHandle(self, self.run(run))

    def cancel(self, run: str) -> JSON:
        """Cancel a run and wait for its end; nothing happens to one that has ended."""
        return self._object("DELETE", _join("runs", run))

    def events(self, run: str, since: int = 0, follow: bool = False, patience: float = 60) -> Iterator[JSON]:
        """Events of a run from number `since`; with `follow` until it ends.

        Goes on from the next event when the connection drops or the server restarts, and gives up when it got
        nothing for `patience` seconds of trying.
        """
        again = _Patience(patience)
        params: JSON = {"follow": "1"} if follow else {}
        while True:
            try:
                params["since"] = since
                with self._request(
                    "GET", _join("runs", run, "events"), params=params, stream=True, timeout=(5, None)
                ) as answer:
                    for line in _lines(_body(answer)):
                        again.reset()
                        yield json.loads(line)
                        since += 1
                # A server that shuts down ends its answer as well.
                if not follow or self.run(run)["state"] != "running":
                    return
            except AgentsError as error:
                again.wait(error)

    def watch(
        self, run: str | None = None, since: int = 0, tick: float = 0.25, patience: float = 60
    ) -> Iterator[JSON | None]:
        """Messages of the WebSocket (docs/api.md), and None whenever there is none for `tick` seconds.

        With a run, its events come too, from number `since`, and it stops after the run's `end`. Connects the
        workspace. Reconnects as `events` does.
        """
        again = _Patience(patience)
        while True:
            try:
                socket = self._connect(tick)
            except AgentsError as error:
                again.wait(error)
                continue
            try:
                if run:
                    socket.send(json.dumps({"subscribe": run, "since": since}))
                while True:
                    try:
                        text = socket.recv()
                    except websocket.WebSocketTimeoutException:
                        yield None
                        continue
                    if not text:
                        raise websocket.WebSocketConnectionClosedException("closed")
                    again.reset()
                    message = json.loads(text)
                    if message.get("run") == run and message["type"] == "events":
                        since = message["since"] + len(message["events"])
                    yield message
                    if run and message.get("run") == run and message["type"] == "end":
                        return
            except (websocket.WebSocketException, OSError):
                again.wait(self._gone())
            finally:
                socket.shutdown()  # type: ignore[no-untyped-call]

    def _connect(self, timeout: float) -> websocket.WebSocket:
        try:
            socket = websocket.create_connection(
                "ws" + self.url.removeprefix("http") + "jupyter-agents/events",
                header=self.headers,
                timeout=10,
                suppress_origin=True,  # it is a browser's protection; the token is ours
                # The environment's proxy is passed over only by naming another one that is not used either.
                http_proxy_host="none",
                http_no_proxy=["*"],
                skip_utf8_validation=True,  # it is slow, and decoding does it too
                sslopt={} if self._verify else {"cert_reqs": 0, "check_hostname": False},
            )
        except websocket.WebSocketBadStatusException as error:
            raise _refused(error.status_code, error.resp_body) from None
        except (websocket.WebSocketException, OSError):
            raise self._gone() from None
        socket.settimeout(timeout)
        return socket

    # --- HTTP ---------------------------------------------------------------------------------------------------

    def _object(self, method: str, path: str, **options: Any) -> JSON:
        return dict(self._json(method, path, **options))

    def _list(self, method: str, path: str, **options: Any) -> list[Any]:
        return list(self._json(method, path, **options))

    def _json(self, method: str, path: str, **options: Any) -> Any:
        try:
            return self._request(method, path, **options).json()
        except ValueError:
            raise AgentsError(
                f"The answer of {self.url} is not that of jupyter_agents: is it a Jupyter server?", "server_error"
            ) from None

    def _request(
        self, method: str, path: str, timeout: Any = None, body: Any = None, **options: Any
    ) -> requests.Response:
        url = f"{self.url}jupyter-agents/{path}"
        headers = self.headers
        if body is not None:
            # requests would escape all letters beyond ASCII, and so make a long prompt too long.
            options["data"] = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
            headers = {**headers, "Content-Type": "application/json"}
        try:
            answer = self._session.request(
                method,
                url,
                headers=headers,
                # Starting a workspace takes its time; a server that takes longer than this has hung.
                timeout=timeout or (5, 180),
                allow_redirects=False,
                **options,
            )
        except requests.Timeout:
            raise AgentsError(
                f"The Jupyter server at {self.url} doesn't answer; look at its log, or restart it.", "timeout"
            ) from None
        except requests.RequestException:
            raise self._gone() from None
        if answer.status_code >= 300:
            with answer:
                try:
                    content = answer.content
                except requests.RequestException:
                    content = b""
            raise _refused(answer.status_code, content)
        return answer

    def _gone(self) -> AgentsError:
        return AgentsError(
            f"The Jupyter server at {self.url} can't be reached; start it again, then restart this kernel.",
            "server_gone",
        )


class RunHandle:
    """A run: `wait()` for it, `cancel()` it, look at its `status`, `text`, `cost`, `events()` and `files()`.

    `info` is the API's record of it as last seen; `refresh()` looks again.
    """

    def __init__(self, client: Client, info: JSON):
        self.client = client
        self.info = info
        self.id: str = info["id"]
        self.agent: str = info["agent"]

    def refresh(self) -> RunHandle:
        self.info = self.client.run(self.id)
        return self

    def wait(self, timeout: float | None = None) -> RunHandle:
        """Wait until it has ended. Raises `TimeoutError` when that takes longer than `timeout` seconds."""
        started = time.monotonic()
        if self.status == "running":
            for message in self.client.watch():
                if message and message["type"] in ("state", "run") and self.status != "running":
                    break
                if timeout is not None and time.monotonic() - started > timeout:
                    raise TimeoutError(f"Run {self.id} is still running after {timeout:g} s.")
        return self

    def cancel(self) -> RunHandle:
        """Stop it, and wait until it has stopped."""
        self.info = self.client.cancel(self.id)
        return self

    def check(self) -> RunHandle:
        """Raise `AgentsError` unless it has succeeded or still runs."""
        if self.info["state"] in ("running", "succeeded"):
            return self
        error = self.info["error"] or {}
        raise AgentsError(
            error.get("message") or f"The run {STATES[self.info['state']]}.",
            error.get("reason") or self.info["state"],
            error.get("command"),
        )

    def events(self, since: int = 0, follow: bool = False) -> Iterator[JSON]:
        """Its events from number `since`; with `follow` until it ends."""
        return self.client.events(self.id, since, follow)

    def files(self, path: str = "") -> list[JSON]:
        """Entries of a folder of its agent."""
        return self.client.files(self.agent, path)

    @property
    def status(self) -> str:
        """running, succeeded, failed, cancelled, timed_out, oom_killed or lost."""
        if self.info["state"] == "running":
            self.refresh()
        return str(self.info["state"])

    @property
    def result(self) -> JSON | None:
        """text, cost_usd, input_tokens, output_tokens, turns, duration and session_id; None without an answer."""
        return None if self.status == "running" else self.info["result"]

    @property
    def text(self) -> str:
        """The final answer; empty while there is none."""
        return (self.result or {}).get("text") or ""

    @property
    def cost(self) -> float | None:
        """In US dollars."""
        return (self.result or {}).get("cost_usd")

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<run {self.id} of {self.agent}: {self.info['state']}>"


# --- finding the server -----------------------------------------------------------------------------------------


def _servers() -> list[JSON]:
    """What the running Jupyter servers of this user say of themselves, newest first.

    Read from their files, as `list_running_servers` does, but without importing the whole of jupyter_server.
    """
    found: list[tuple[float, JSON]] = []
    for path in Path(jupyter_runtime_dir()).glob("jpserver-*.json"):
        try:
            found.append((path.stat().st_mtime, json.loads(path.read_text())))
        except (OSError, ValueError):
            continue  # it is just being written, or removed
    return [info for _, info in sorted(found, key=lambda f: f[0], reverse=True) if not info.get("sock")]


def _is_ours(info: JSON) -> bool:
    """Whether this kernel, or this Jupyter terminal, was started by that server."""
    parents = {
        os.environ.get("JPY_PARENT_PID"),
        str(os.getppid()),
    }  # on Windows the former is no process number
    return str(info.get("pid")) in parents or info.get("url") == os.environ.get("JUPYTER_SERVER_URL", "none")


def _address(info: JSON) -> str:
    """Where to reach it from this machine; a server on all addresses names itself by a name that may not resolve."""
    if info.get("hostname") in ("", "*", "0.0.0.0", "::"):  # noqa: S104 - not bound, but asked
        scheme = "https" if info.get("secure") else "http"
        return f"{scheme}://127.0.0.1:{info['port']}{info['base_url']}"
    return str(info["url"])


_private: tuple[subprocess.Popen[bytes], Client] | None = None


def _private_server(timeout: float = 60) -> Client:
    """Client of this process's private server, started when there is none.

    It listens on loopback, has a random token, and ends when its stdin does: with this process, however that ends.
    """
    global _private
    if _private and _private[0].poll() is None:
        return _private[1]
    token = secrets.token_hex(24)
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", "from jupyter_agents.client import serve_privately; serve_privately()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # an interrupt in the terminal is not for it
        )
        assert process.stdin
        process.stdin.write(token.encode() + b"\n")
        process.stdin.flush()
        info_file = Path(jupyter_runtime_dir()) / f"jpserver-{process.pid}.json"
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
            try:
                info = json.loads(info_file.read_text())
                if info["token"] != token:
                    continue  # of a former process of this number
                client = Client(_address(info), token)
                client.workspace()
            except (OSError, ValueError):
                continue
            except AgentsError as error:
                if error.status:
                    break
                continue  # it doesn't listen yet
            atexit.register(process.stdin.close)
            _private = process, client
            return client
        process.kill()
        process.wait()
        errors.seek(0)
        lines = errors.read().decode("utf-8", "replace").strip().splitlines() or ["it did not start in time"]
        raise AgentsError(
            f"No Jupyter server is around this kernel, and a private one could not be started: {lines[-1][:300]}",
            "no_server",
            "jupyter agents doctor",
        )


def serve_privately() -> None:
    """Be a private server: the token is the first line of stdin, and the end of stdin ends it."""
    import signal
    import threading

    from jupyter_server.serverapp import ServerApp

    token = sys.stdin.buffer.readline().decode().strip()

    class PrivateServer(ServerApp):
        """With the user's configuration, but of the extensions with this one only."""

        def find_server_extensions(self) -> None:
            self.jpserver_extensions = {"jupyter_agents": True}

    def end_with_parent() -> None:
        while os.read(0, 1):  # unlike sys.stdin, nothing that the interpreter has to lock when it ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Not the process's own arguments, which everybody on the machine can read.
    PrivateServer.launch_instance(
        [
            f"--IdentityProvider.token={token}",
            "--ServerApp.ip=127.0.0.1",
            "--ServerApp.port=0",
            "--ServerApp.sock=",
            "--ServerApp.certfile=",
            "--ServerApp.open_browser=False",
            "--ServerApp.allow_root=True",
            "--ServerApp.log_level=ERROR",
        ]
    )


# --- helpers ----------------------------------------------------------------------------------------------------


class _Patience:
    """Waits longer after each failure, and raises it once the last success is `limit` seconds ago."""

    def __init__(self, limit: float):
        self.limit = limit
        self.answered = False
        self.delay = 0.1
        self.since: float | None = None

    def reset(self) -> None:
        self.answered = True
        self.delay = 0.1
        self.since = None

    def wait(self, error: AgentsError) -> None:
        # A Hub's proxy that was just started doesn't know yet what it knew before.
        lost_its_way = self.answered and (error.status == 302 or error.reason == "no_extension")
        if error.status and error.status not in (502, 503, 504) and not lost_its_way:
            raise error
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since > self.limit:
            raise error
        time.sleep(self.delay)
        self.delay = min(self.delay * 2, 3)


def _refused(status: int, content: bytes | None) -> AgentsError:
    """The error in an answer of the server."""
    try:
        body = json.loads(content or b"")
        message, reason = body["message"], body.get("reason")
    except (ValueError, KeyError, TypeError):
        message = reason = None
    if message and reason and not reason.startswith("http_"):  # else Jupyter's own words, which say little
        return AgentsError(message, reason, body.get("command"), status)
    if status == 404:
        return AgentsError(
            "The Jupyter server doesn't have the jupyter_agents extension: install it where the server runs, "
            "enable it, and restart the server.",
            "no_extension",
            "jupyter server extension enable jupyter_agents",
            status,
        )
    if status in (301, 302, 303, 401, 403):
        return AgentsError(
            "The Jupyter server doesn't accept this kernel's token; restart the kernel, or the server when that "
            "doesn't help.",
            "not_authenticated",
            status=status,
        )
    return AgentsError(
        f"The Jupyter server failed (HTTP {status}{f': {message}' if message else ''}); its log says why.",
        "server_error",
        status=status,
    )


def _join(*parts: str) -> str:
    for part in parts:
        if part in ("", ".", ".."):  # the HTTP library would take these for steps
            raise AgentsError(f"{part!r} is not the name of an agent or run.", "bad_request")
    return "/".join(urllib.parse.quote(part, safe="") for part in parts)


def _file(agent: str, path: str) -> str:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise AgentsError("A path can't have '..' in it; paths are relative to the agent's directory.", "bad_path")
    return f"{_join('agents', agent, 'files')}/{'/'.join(urllib.parse.quote(part, safe='') for part in parts)}"


def _leads_out(member: tarfile.TarInfo, folder: str) -> bool:
    """Whether a link could lead out of the folder, now or when there are further ones.

    tarfile's own filter asks what a path leads to, and in some releases of Python can be deceived about that. A link
    that first climbs, and not too far, and then only descends, stays within whatever else there is.
    """
    if member.islnk():  # to what has been written before, and not to a symbolic link, which would work differently here
        there = os.path.join(folder, member.linkname)
        return os.path.islink(there) or not os.path.isfile(there)
    if not member.issym():
        return False
    above = [part for part in member.name.split("/")[:-1] if part not in ("", ".")]
    parts = [part for part in member.linkname.split("/") if part not in ("", ".")]
    climbs = len(list(itertools.takewhile(lambda part: part == "..", parts)))
    return climbs > len(above) or ".." in above + parts[climbs:]


def _is_json(answer: requests.Response) -> bool:
    return answer.headers.get("Content-Type", "").startswith("application/json")


def _body(answer: requests.Response) -> Iterator[bytes]:
    """The body as it arrives; a connection that breaks is an `AgentsError`."""
    try:
        yield from answer.iter_content(CHUNK if "Content-Length" in answer.headers else None)
    except requests.RequestException:
        raise AgentsError("The connection to the Jupyter server broke; try again.", "server_gone") from None


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines; what comes after the last newline is dropped."""
    begun: list[bytes] = []  # joined once, since a line can be megabytes long
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        begun.append(first)
        for piece in rest:
            yield b"".join(begun)
            begun = [piece]
