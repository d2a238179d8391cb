"""The Hub that the tests run: real in all but the passwords. Values that differ from run to run come by environment."""

import json
import os

from jupyterhub.auth import DummyAuthenticator
from jupyterhub.services.service import _ServiceSpawner
from traitlets.config import get_config

from jupyter_agents.hub import configure

c = get_config()
setup = json.loads(os.environ["HUB_TEST_SETUP"])
port = setup["port"]

# The Hub looks every 30 s whether a service has died, and has no setting for it.
_ServiceSpawner.poll_interval = 1


class AsTyped(DummyAuthenticator):
    """Keeps the case of names, as an identity provider may."""

    def normalize_username(self, username: str) -> str:
        return username


c.JupyterHub.authenticator_class = AsTyped
c.DummyAuthenticator.password = "correct horse"
c.Authenticator.allow_all = True
c.JupyterHub.allow_named_servers = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = os.path.abspath("home/{username}")
c.Spawner.args = ["--ServerApp.jpserver_extensions={'jupyter_agents': True}", "--allow-root"]
c.Spawner.environment = {
    "PYTHONPATH": os.environ["PYTHONPATH"],
    # JupyterLab is where the tests run, which need not be where the Hub does.
    "JUPYTER_CONFIG_PATH": f"{setup['prefix']}/etc/jupyter",
    "JUPYTER_PATH": f"{setup['prefix']}/share/jupyter",
}

c.JupyterHub.bind_url = f"http://127.0.0.1:{port}/base/"
c.JupyterHub.hub_port = port + 1
c.ConfigurableHTTPProxy.api_url = f"http://127.0.0.1:{port + 2}"
c.ConfigurableHTTPProxy.command = [setup["proxy"]]

c.JupyterHub.load_groups = {"small": {"users": ["carol"]}, "large": {"users": ["carol", "dave"]}}
# What the tests do as the administrator, and a service that has nothing to do with ours.
c.JupyterHub.services = [
    {"name": "tester", "api_token": setup["admin_token"]},
    {"name": "stranger", "api_token": setup["stranger_token"]},
]
c.JupyterHub.load_roles = [
    {
        "name": "tester",
        "services": ["tester"],
        "scopes": ["admin:users", "admin:servers", "tokens", "access:servers", "groups"],
    }
]

configure(
    c,
    url=f"http://127.0.0.1:{port + 3}",
    admins=["boss"],
    args=[f"--config={setup['service_config']}"],
    environment=setup["environment"],
)
