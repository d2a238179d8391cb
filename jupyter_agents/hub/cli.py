"""`jupyter agents hub`: the service itself, and for administrators its list of workspaces."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any
from urllib.parse import quote

import requests


def main(argv: list[str]) -> int:
    """Without a verb, be the service; all other arguments are its settings then. Returns the exit code."""
    if argv[:1] not in (["list"], ["stop"], ["delete"]):
        from .service import AgentsHub

        AgentsHub.launch_instance(argv)
        return 0
    parser = argparse.ArgumentParser(
        prog="jupyter agents hub", description="List all workspaces, stop one, or delete one with its files."
    )
    parser.add_argument("verb", choices=["list", "stop", "delete"])
    parser.add_argument("user", nargs="?", help="whose workspace to stop or delete")
    parser.add_argument(
        "--url",
        default=os.environ.get("JUPYTER_AGENTS_SERVICE_URL", "http://127.0.0.1:8000/services/jupyter-agents/"),
        help="of the service; the token comes from JUPYTERHUB_API_TOKEN",
    )
    parser.add_argument("--json", action="store_true", help="answer in JSON")
    args = parser.parse_args(argv)
    if (args.verb == "list") == bool(args.user):
        parser.error(f"{args.verb} takes {'no user' if args.user else 'a user'}")
    return _ask(args)


def _ask(args: argparse.Namespace) -> int:
    address = f"{args.url.rstrip('/')}/workspaces"
    if args.user:
        address += f"/{quote(args.user, safe='')}?volume={int(args.verb == 'delete')}"
    headers = {"Authorization": f"token {os.environ.get('JUPYTERHUB_API_TOKEN', '')}"}
    try:
        answer = requests.request("DELETE" if args.user else "GET", address, headers=headers, timeout=180)
        body = answer.json() if answer.content else None
    except (requests.RequestException, ValueError):
        sys.stderr.write(f"The service does not answer at {args.url}: give its address with --url.\n")
        return 1
    if not answer.ok:
        sys.stderr.write(f"{(body or {}).get('message', answer.reason)}\n")
        return 1
    if args.json:
        sys.stdout.write(json.dumps(body) + "\n")
    for workspace in [] if args.json else body or []:
        note = "" if workspace["in_hub"] else "  not in the Hub"
        sys.stdout.write(f"{workspace['user']}  {_facts(workspace)}{note}\n")
    return 0


def _facts(workspace: dict[str, Any]) -> str:
    if workspace["started"] is None:
        return str(workspace["state"])
    used = f"{workspace['memory']['used_bytes'] / 2**20:.0f}" if workspace["memory"] else "?"
    cap = workspace["limits"]["memory_bytes"] / 2**20
    return f"{used} of {cap:.0f} MB  {workspace['agents']} agents  {workspace['active_runs']} runs"
