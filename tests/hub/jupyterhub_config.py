"""The Hub that the tests run: real in all but the passwords. Values that differ from run to run come by environment."""

import json
import os
from collections.abc import Callable

from jupyterhub.auth import DummyAuthenticator
from jupyterhub.services.service import _ServiceSpawner
from jupyterhub.spawner import SimpleLocalProcessSpawner
from traitlets import default
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


class WithSystemUsers(SimpleLocalProcessSpawner):
    """Runs the servers of each user as a system user of their own, where the Hub may do that: as root.

    They keep one privilege, to read and traverse what is there, as Python or the checkout may lie in a directory that
    is closed to others. It opens neither sockets nor other users' processes. `test_kernels.py` gives it up.
    """

    @property
    def uid(self) -> int:
        # Not one that an agent may have, in whose processes a system user of the same uid can look.
        return 9000 + self.user.id

    @default("cmd")
    def _default_cmd(self) -> list[str]:
        if os.geteuid() != 0:
            return ["jupyterhub-singleuser"]
        user = [f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--no-new-privs"]
        kept = "-all,+dac_read_search"
        capabilities = [f"--inh-caps={kept}", f"--ambient-caps={kept}", f"--bounding-set={kept}"]
        return ["setpriv", *user, *capabilities, "jupyterhub-singleuser"]

    def make_preexec_fn(self, name: str) -> Callable[[], None]:
        enter_home = super().make_preexec_fn(name)

        def preexec() -> None:
            enter_home()
            if os.geteuid() == 0:
                os.chown(".", self.uid, self.uid)

        return preexec


c.JupyterHub.authenticator_class = AsTyped
c.DummyAuthenticator.password = "correct horse"
c.Authenticator.allow_all = True
c.JupyterHub.allow_named_servers = True
c.JupyterHub.spawner_class = WithSystemUsers
c.SimpleLocalProcessSpawner.home_dir_template = os.path.abspath("home/{username}")
c.Spawner.args = ["--ServerApp.jpserver_extensions={'jupyter_agents': True}"]
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
c.ConfigurableHTTPProxy.check_running_interval = 1

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
    api_token=setup["service_token"],
)
exec(setup["hub_config"])
