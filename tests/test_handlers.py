"""Who may call what, and the two streams of events: HTTP and WebSocket."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import docker
import pytest
from helpers import IMAGE, another_name
from jupyter_server.auth import Authorizer
from jupyter_server.auth.decorator import authorized, ws_authenticated
from tornado import web
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from jupyter_agents import contract, handlers
from jupyter_agents.errors import BadRequest

EXAMPLES = {"{agent}": "demo", "{run}": "20260101-000000-00000000", "{path}": "a.txt"}
VERBS = ("get", "head", "post", "put", "patch", "delete")


def example(path: str) -> str:
    for name, value in EXAMPLES.items():
        path = path.replace(name, value)
    return path.lstrip("/")


def operations() -> Iterator[tuple[str, str]]:
    """Every (verb, path) of the contract, with examples for what is variable in it."""
    for path, item in contract.document()["paths"].items():
        for verb in item.keys() & set(VERBS):
            yield verb, example(path)


HTTP = sorted(o for o in operations() if o[1] != "events")


# --- decorators and the contract ------------------------------------------------------------------------------------


def methods(handler: type[web.RequestHandler]) -> dict[str, Any]:
    """What answers requests: its verbs, and what a streaming handler does before the body comes."""
    found = {verb: getattr(handler, verb) for verb in VERBS}
    found = {verb: m for verb, m in found.items() if m is not getattr(web.RequestHandler, verb)}
    if web._has_stream_request_body(handler):
        found["receive"] = getattr(handler, "receive", None)
    return found


def guarded(method: Any) -> bool:
    """Authentication outside, authorisation inside it."""

    def nothing() -> None: ...

    outer = {web.authenticated(nothing).__code__, ws_authenticated(nothing).__code__}
    inner = getattr(method, "__wrapped__", None)
    return (
        getattr(method, "__code__", None) in outer and getattr(inner, "__code__", None) is authorized(nothing).__code__
    )


@pytest.mark.parametrize("handler", [handler for _, handler in handlers.ROUTES], ids=lambda h: h.__name__)
def test_every_verb_is_authenticated_and_authorised(handler: type[web.RequestHandler]) -> None:
    assert methods(handler)
    assert [name for name, method in methods(handler).items() if not guarded(method)] == []
    assert handler.auth_resource == "agents"  # type: ignore[attr-defined]


def test_that_check_finds_what_is_not_guarded() -> None:
    @web.stream_request_body
    class Careless(handlers.ApiHandler):
        def get(self) -> None: ...

        @web.authenticated
        def post(self) -> None: ...

        @authorized
        async def put(self) -> None: ...

        @authorized
        @web.authenticated
        async def delete(self) -> None: ...

    assert [n for n, m in methods(Careless).items() if not guarded(m)] == ["get", "post", "put", "delete", "receive"]


def test_routes_and_contract_agree() -> None:
    documented = {
        (pattern, verb) for verb, path in operations() for pattern, _ in handlers.ROUTES if re.fullmatch(pattern, path)
    }
    assert documented == {(pattern, verb) for pattern, h in handlers.ROUTES for verb in methods(h) if verb in VERBS}
    for _, path in operations():
        assert sum(bool(re.fullmatch(pattern, path)) for pattern, _ in handlers.ROUTES) == 1, path


async def test_contract_is_served_as_it_is(api: Any) -> None:
    status, text = await api("GET", "openapi.yaml")
    assert (status, text.decode()) == (200, contract.TEXT)


# --- authentication, authorisation, XSRF ----------------------------------------------------------------------------

BODY = {"post": b"{}", "put": b"x", "patch": b"{}"}


@pytest.mark.parametrize("token", [None, "token wrong", "garbage", "token "])
async def test_unauthenticated_requests_are_refused(
    http_server_client: Any, jp_base_url: str, jp_serverapp: Any, token: str | None
) -> None:
    headers = {"Content-Type": "application/json"} | ({"Authorization": token} if token else {})
    for verb, path in HTTP:
        response = await http_server_client.fetch(
            f"{jp_base_url}jupyter-agents/{path}",
            method=verb.upper(),
            body=BODY.get(verb),
            headers=headers,
            allow_nonstandard_methods=True,
            follow_redirects=False,
            raise_error=False,
        )
        assert response.code in (401, 403), (verb, path, response.code)
        assert set(json.loads(response.body)) == {"message", "reason"}
    assert next(iter(jp_serverapp.extension_manager.extension_apps["jupyter_agents"])).workspaces._workspaces == {}


async def test_unauthenticated_websocket_is_refused(jp_ws_fetch: Any) -> None:
    for headers in ({"Authorization": "token wrong"}, {"Authorization": ""}):
        with pytest.raises(HTTPClientError) as refused:
            await jp_ws_fetch("jupyter-agents", "events", headers=headers)
        assert refused.value.code == 403


async def test_long_uploads_are_refused_before_their_body_comes(
    jp_fetch: Any, jp_base_url: str, jp_http_port: int
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", jp_http_port)
    writer.write(
        f"PUT {jp_base_url}jupyter-agents/agents/demo/files/x HTTP/1.1\r\n"
        "Host: localhost\r\nContent-Length: 1000000000\r\n\r\n".encode()
    )
    answer = await asyncio.wait_for(reader.readline(), 5)
    assert int(answer.split()[1]) in (401, 403)
    writer.close()


class Refuses(Authorizer):
    asked: list[tuple[str, str]]

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        self.asked.append((action, resource))
        return False


class TestAuthorizer:
    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any]) -> dict[str, Any]:
        jp_server_config["ServerApp"]["authorizer_class"] = Refuses
        Refuses.asked = []
        return jp_server_config

    @pytest.mark.parametrize(("verb", "path"), HTTP)
    async def test_its_refusal_is_403(self, jp_fetch: Any, verb: str, path: str) -> None:
        response = await jp_fetch(
            "jupyter-agents",
            path,
            method=verb.upper(),
            body=BODY.get(verb),
            headers={"Content-Type": "application/json"},
            allow_nonstandard_methods=True,
            raise_error=False,
        )
        assert response.code == 403
        assert "not authorized" in json.loads(response.body)["message"]
        assert Refuses.asked == [("read" if verb == "get" else "write", "agents")]

    async def test_its_refusal_holds_for_the_websocket(self, jp_ws_fetch: Any) -> None:
        with pytest.raises(HTTPClientError) as refused:
            await jp_ws_fetch("jupyter-agents", "events")
        assert refused.value.code == 403
        assert [resource for _, resource in Refuses.asked] == ["agents"]


@pytest.fixture
def cookies(http_server_client: Any, jp_base_url: str, jp_serverapp: Any, jp_asyncio_loop: Any) -> dict[str, str]:
    """Those of a browser that has logged in."""
    return jp_asyncio_loop.run_until_complete(log_in(http_server_client, jp_base_url, jp_serverapp))


async def log_in(http_server_client: Any, jp_base_url: str, jp_serverapp: Any) -> dict[str, str]:
    page = await http_server_client.fetch(f"{jp_base_url}login", raise_error=False)
    jar = {c.partition("=")[0]: c.partition(";")[0].partition("=")[2] for c in page.headers.get_list("Set-Cookie")}
    answer = await http_server_client.fetch(
        f"{jp_base_url}login",
        method="POST",
        headers={"Cookie": f"_xsrf={jar['_xsrf']}"},
        body=f"password={jp_serverapp.identity_provider.token}&_xsrf={jar['_xsrf']}",
        follow_redirects=False,
        raise_error=False,
    )
    assert answer.code == 302, answer.body
    for cookie in answer.headers.get_list("Set-Cookie"):
        name, _, rest = cookie.partition("=")
        jar[name] = rest.partition(";")[0]
    return jar


def header(jar: dict[str, str]) -> dict[str, str]:
    return {"Cookie": "; ".join(f"{name}={value}" for name, value in jar.items()), "Authorization": ""}


async def test_cookies_alone_change_nothing(api: Any, cookies: dict[str, str]) -> None:
    status, _ = await api("GET", "agents", headers=header(cookies))
    assert status == 200
    for verb, path, body in [
        ("POST", "agents", {"id": "forged"}),
        ("PUT", "agents/forged/files/x", {}),
        ("DELETE", "workspace", None),
    ]:
        status, answer = await api(verb, path, body, headers=header(cookies))
        assert status == 403, (verb, path)
        assert "_xsrf" in answer["message"]
    proof = header(cookies) | {"X-XSRFToken": cookies["_xsrf"]}
    status, _ = await api("POST", "agents", {"id": "meant"}, headers=proof)
    assert status == 201
    status, agents = await api("GET", "agents")
    assert [agent["id"] for agent in agents] == ["meant"]


async def test_other_sites_get_no_websocket(
    cookies: dict[str, str], jp_http_port: int, jp_base_url: str, model: str
) -> None:
    site = f"127.0.0.1:{jp_http_port}"
    url = f"ws://{site}{jp_base_url}jupyter-agents/events"
    for origin in ("https://evil.example", f"http://127.0.0.1:{jp_http_port + 1}", "null"):
        with pytest.raises(HTTPClientError) as refused:
            await websocket_connect(HTTPRequest(url, headers=header(cookies) | {"Origin": origin}))
        assert refused.value.code == 403
    socket = await websocket_connect(HTTPRequest(url, headers=header(cookies) | {"Origin": f"http://{site}"}))
    assert (await socket.read_message()).startswith('{"type": "state"')
    socket.close()


# --- bad requests ---------------------------------------------------------------------------------------------------


async def test_bad_requests(api: Any) -> None:
    await api("POST", "agents", {"id": "a1"})
    for verb, path, body, kind, status, reason in [
        ("POST", "agents", b"{", "application/json", 400, "bad_request"),
        ("POST", "agents", b"", "application/json", 400, "bad_request"),
        ("POST", "agents", b"[" * 50000, "application/json", 400, "bad_request"),
        ("POST", "agents", b'{"id": "\xff"}', "application/json", 400, "bad_request"),
        ("POST", "agents", b"[]", "application/json", 400, "bad_request"),
        ("POST", "agents", b'{"id": 1}', "application/json", 400, "bad_request"),
        ("POST", "agents", b'{"id": "x", "colour": "red"}', "application/json", 400, "bad_request"),
        ("POST", "agents", b'{"id": "x"}', "text/plain", 415, "wrong_content_type"),
        ("POST", "agents", b'{"id": "x"}', "", 415, "wrong_content_type"),
        ("PATCH", "agents/a1/env", b"A=1", "application/x-www-form-urlencoded", 415, "wrong_content_type"),
        ("PATCH", "agents/a1/files/x", b"", "application/json", 400, "bad_request"),
        ("POST", "agents/a1/runs", b'{"prompt": ""}', "application/json", 400, "empty_prompt"),
        ("POST", "agents/a1/runs", b'{"prompt": " \\n"}', "application/json", 400, "empty_prompt"),
        ("POST", "agents/a1/runs", b'{"prompt": "x", "timeout": NaN}', "application/json", 400, "bad_request"),
        ("POST", "agents/a1/runs", b'{"prompt": "x", "timeout": 1e999}', "application/json", 400, "bad_request"),
        ("POST", "agents/a1/runs", b'{"prompt": "x", "max_turns": 0}', "application/json", 400, "bad_request"),
        ("POST", "agents/none/runs", b'{"prompt": "x"}', "application/json", 404, "unknown_agent"),
        ("POST", "agents/a1/runs", json.dumps({"prompt": "x" * 2**21}), "application/json", 413, "too_large"),
        ("POST", "agents/a1/runs", b" " * (9 * 2**20), "application/json", 413, "too_large"),
        ("POST", "agents", b" " * 2**16 + b"{}", "application/json", 413, "too_large"),
        ("PATCH", "agents/none/env", b"{", "application/json", 404, "unknown_agent"),
        (
            "PATCH",
            "agents/a1/env",
            json.dumps(dict.fromkeys(map("N{}".format, range(1001)))),
            "application/json",
            400,
            "bad_request",
        ),
        ("GET", "runs/20260101-000000-00000000", None, "", 404, "unknown_run"),
        ("DELETE", "runs/20260101-000000-00000000", None, "", 404, "unknown_run"),
        ("GET", "runs/nonsense/events", None, "", 404, "unknown_run"),
        ("DELETE", "workspace?volume=2", None, "", 400, "bad_request"),
        ("GET", "agents/a1/files/?format=zip", None, "", 400, "bad_request"),
    ]:
        path, _, query = path.partition("?")
        params = dict([query.split("=")]) if query else {}
        answer = await api(verb, path, data=body, headers={"Content-Type": kind}, params=params)
        assert (answer[0], answer[1].get("reason")) == (status, reason), (verb, path, body and body[:50], answer)
        assert "Traceback" not in answer[1]["message"]
    assert (await api("GET", "runs"))[1] == []


class TestAllowedImages:
    @pytest.fixture
    def image(self, user: str, docker_api: docker.APIClient) -> Iterator[str]:
        with another_name(docker_api, user) as image:
            yield image

    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any], image: str) -> dict[str, Any]:
        return {**jp_server_config, "DockerEngine": {"allowed_images": [image, "nobody/has-this:1"]}}

    async def test_one_is_chosen(self, api: Any, image: str) -> None:
        _, told = await api("GET", "workspace")
        assert (told["image"], told["images"]) == (None, [IMAGE, image, "nobody/has-this:1"])
        for body, made_from in ((None, IMAGE), ({"image": image}, image), ({}, image), ({"image": IMAGE}, IMAGE)):
            status, told = await api("POST", "workspace", body)
            assert (status, told["state"], told["image"]) == (200, "ready", made_from)
        for body, status, reason in (
            ({"image": "debian:bookworm-slim"}, 403, "image_not_allowed"),
            ({"image": "nobody/has-this:1"}, 503, "image_missing"),
            ({"image": None}, 400, "bad_request"),
            ({"picture": image}, 400, "bad_request"),
            ([], 400, "bad_request"),
        ):
            code, told = await api("POST", "workspace", body)
            assert (code, told["reason"]) == (status, reason), body
        await api("POST", "agents", {"id": "a"})
        await api("POST", "agents/a/runs", {"prompt": "[[sleep 60]]"})
        status, told = await api("POST", "workspace", {"image": image})
        assert (status, told["reason"]) == (409, "runs_active")
        assert (await api("GET", "workspace"))[1]["image"] == IMAGE


async def test_unknown_paths_and_verbs(api: Any) -> None:
    assert (await api("POST", "runs", {}))[0] == 405
    assert (await api("GET", "nothing"))[0] == 404


# --- events ---------------------------------------------------------------------------------------------------------


async def ended(api: Any, agent: str, prompt: str) -> dict[str, Any]:
    """A run of this prompt that has ended."""
    status, run = await api("POST", f"agents/{agent}/runs", {"prompt": prompt})
    assert status == 201, run
    while run["state"] == "running":
        await asyncio.sleep(0.1)
        _, run = await api("GET", f"runs/{run['id']}")
    return run  # type: ignore[no-any-return]


async def test_events_over_http(api: Any) -> None:
    await api("POST", "agents", {"id": "a1"})
    run = await ended(api, "a1", "[[say hello]]")
    status, text = await api("GET", f"runs/{run['id']}/events")
    events = [json.loads(line) for line in text.splitlines()]
    assert status == 200
    assert events[0]["type"] == "system"
    assert events[-1]["type"] == "run_end"
    for since in (0, 1, len(events) - 1, len(events), 10**12):
        for follow in ("0", "1"):
            status, part = await api("GET", f"runs/{run['id']}/events", params={"since": since, "follow": follow})
            assert (status, part) == (200, b"".join(text.splitlines(True)[since:]))
    for wrong in ({"since": "-1"}, {"since": "x"}, {"since": "1" * 16}, {"follow": "yes"}):
        status, error = await api("GET", f"runs/{run['id']}/events", params=wrong)
        assert (status, error["reason"]) == (400, "bad_request")


async def test_following_over_http(api: Any, jp_fetch: Any) -> None:
    await api("POST", "agents", {"id": "a1"})
    _, run = await api("POST", "agents/a1/runs", {"prompt": "[[slow 10 0.2]]"})
    chunks: list[tuple[float, bytes]] = []
    await jp_fetch(
        "jupyter-agents",
        f"runs/{run['id']}/events",
        params={"follow": 1},
        streaming_callback=lambda chunk: chunks.append((time.monotonic(), chunk)),
        request_timeout=60,
    )
    lines = b"".join(chunk for _, chunk in chunks).splitlines()
    assert json.loads(lines[-1])["type"] == "run_end"
    assert chunks[-1][0] - chunks[0][0] > 1.5  # it came as it was written
    assert lines == (await api("GET", f"runs/{run['id']}/events"))[1].splitlines()


async def next_of(socket: WebSocketClientConnection, kind: str, **fields: Any) -> dict[str, Any]:
    """The next message of that type which has these fields."""
    async with asyncio.timeout(30):
        while True:
            text = await socket.read_message()
            assert text is not None, "the socket was closed"
            message: dict[str, Any] = json.loads(text)
            if message["type"] == kind and fields.items() <= message.items():
                return message


@pytest.fixture
def socket(jp_ws_fetch: Any, api: Any, jp_asyncio_loop: Any) -> Iterator[WebSocketClientConnection]:
    connection = jp_asyncio_loop.run_until_complete(jp_ws_fetch("jupyter-agents", "events"))
    yield connection
    connection.close()


async def subscribed(socket: WebSocketClientConnection, run: str, since: int) -> list[dict[str, Any]]:
    """All events of a run from `since` on, over a subscription."""
    await socket.write_message(json.dumps({"subscribe": run, "since": since}))
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(30):
        while True:
            message = json.loads(await socket.read_message())
            if message.get("run") == run and message["type"] == "events":
                assert message["since"] == since + len(events)
                events += message["events"]
            elif message.get("run") == run and message["type"] == "end":
                assert message["next"] == since + len(events)
                return events


async def test_websocket_tells_the_state_and_what_changes(api: Any, socket: WebSocketClientConnection) -> None:
    first = json.loads(await asyncio.wait_for(socket.read_message(), 1))
    assert first["type"] == "state"
    assert first["agents"] == []
    memory = (await next_of(socket, "memory"))["memory"]
    assert 0 < memory["used_bytes"] < memory["limit_bytes"] == 2**30
    await api("POST", "agents", {"id": "a1"})
    while not (state := await next_of(socket, "state"))["agents"]:
        pass
    assert state["workspace"]["state"] == "ready"
    assert state["agents"][0]["id"] == "a1"
    _, run = await api("POST", "agents/a1/runs", {"prompt": "[[say hello]]"})
    started = await next_of(socket, "run")
    assert (started["run"]["id"], started["run"]["state"]) == (run["id"], "running")
    over = await next_of(socket, "run")
    assert (over["run"]["id"], over["run"]["state"]) == (run["id"], "succeeded")


async def test_websocket_subscriptions(api: Any, socket: WebSocketClientConnection) -> None:
    await api("POST", "agents", {"id": "a1"})
    _, run = await api("POST", "agents/a1/runs", {"prompt": "[[slow 5 0.1]]"})
    live = await subscribed(socket, run["id"], 0)
    text = (await api("GET", f"runs/{run['id']}/events"))[1]
    assert live == [json.loads(line) for line in text.splitlines()]
    assert live[-1]["type"] == "run_end"
    assert await subscribed(socket, run["id"], 3) == live[3:]
    assert await subscribed(socket, run["id"], len(live)) == []
    assert await subscribed(socket, run["id"], 10**9) == []


async def test_websocket_unsubscribe(api: Any, socket: WebSocketClientConnection) -> None:
    await api("POST", "agents", {"id": "a1"})
    _, run = await api("POST", "agents/a1/runs", {"prompt": "[[slow 20 0.1]]"})
    await socket.write_message(json.dumps({"subscribe": run["id"], "since": 0}))
    await next_of(socket, "events", run=run["id"])
    await socket.write_message(json.dumps({"unsubscribe": run["id"]}))
    await socket.write_message("mark")
    await next_of(socket, "error")
    kinds = []
    async with asyncio.timeout(30):
        while not kinds or kinds[-1] != "run":
            kinds.append(json.loads(await socket.read_message())["type"])
    assert "events" not in kinds
    assert "end" not in kinds


NONSENSE: list[str | bytes] = ["", "nonsense", "[]", "{}", "1", '{"subscribe": 1}', '{"subscribe": null}', b"\xff\x00"]
NONSENSE += ["[" * 50000, '{"subscribe": "x", "since": 1' + "0" * 15 + "}"]
NONSENSE += [f'{{"subscribe": "x", "since": {since}}}' for since in ("-1", "1.5", "true", '"1"', "null", "NaN")]


async def test_websocket_nonsense(socket: WebSocketClientConnection) -> None:
    for message in NONSENSE:
        await socket.write_message(message, binary=isinstance(message, bytes))
        error = await next_of(socket, "error")
        assert error["reason"] == "bad_request", message[:50]
        assert "run" not in error
    await socket.write_message(json.dumps({"subscribe": "x"}))  # it goes on
    assert (await next_of(socket, "error"))["reason"] == "unknown_run"


async def test_websocket_errors_of_a_subscription(socket: WebSocketClientConnection) -> None:
    await socket.write_message(json.dumps({"subscribe": "20260101-000000-00000000"}))
    error = await next_of(socket, "error")
    assert (error["reason"], error["run"]) == ("unknown_run", "20260101-000000-00000000")
    await socket.write_message(json.dumps({"unsubscribe": "of what was never subscribed"}))
    await socket.write_message("mark")
    assert (await next_of(socket, "error"))["message"] == "The body of the request is not JSON."


def test_a_huge_body_is_refused_quickly() -> None:
    body = {f"N{i}": "x" for i in range(100_000)}
    began = time.process_time()
    for operation in ("setEnv", "createAgent", "startRun"):
        with pytest.raises(BadRequest) as refused:
            contract.check(operation, body)
        assert len(refused.value.message) < 300
    assert time.process_time() - began < 0.1
    assert (
        contract.document()["paths"]["/agents/{agent}/env"]["patch"]["requestBody"]["content"]["application/json"][
            "schema"
        ]["maxProperties"]
        == contract.MAX_MEMBERS
    )


async def test_websocket_refuses_long_messages(socket: WebSocketClientConnection) -> None:
    await socket.write_message(json.dumps({"subscribe": "x" * 2**16}))
    async with asyncio.timeout(10):
        while await socket.read_message() is not None:
            pass
    assert socket.close_code == 1009


async def test_websocket_never_repeats_an_id_that_no_run_has(socket: WebSocketClientConnection) -> None:
    await socket.write_message(json.dumps({"subscribe": "x" * 60_000}))
    error = await next_of(socket, "error")
    assert (error["reason"], "run" in error, "xx" in error["message"]) == ("unknown_run", False, False)


async def test_a_slow_reader_holds_up_only_itself() -> None:
    """One message is under way at most, however many are cancelled while they wait."""
    handler: Any = handlers.EventsSocket.__new__(handlers.EventsSocket)
    handler._turn, handler._sent = asyncio.Lock(), None
    read, written = asyncio.Event(), []

    async def write_message(message: Any) -> None:
        written.append(message)
        await read.wait()

    handler.write_message = write_message
    for n in range(10):
        task = asyncio.ensure_future(handler._write(str(n)))
        await asyncio.sleep(0.01)
        task.cancel()
    assert written == ["0"]
    read.set()
    await handler._write("last")
    assert written == ["0", "last"]
