"""What a run's environment holds: a list of names from the server's own, then the agent's `.env`, which wins."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping

from dotenv.parser import parse_stream

PASSED_ON = [
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "ANTHROPIC_BASE_URL",
    "ANTHROPIC_CUSTOM_HEADERS",
    "ANTHROPIC_MODEL",
    "ANTHROPIC_DEFAULT_OPUS_MODEL",
    "ANTHROPIC_DEFAULT_SONNET_MODEL",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL",
    "ANTHROPIC_SMALL_FAST_MODEL",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
    "CLAUDE_CODE_SUBAGENT_MODEL",
    "DISABLE_TELEMETRY",
    "DISABLE_ERROR_REPORTING",
    "MAX_THINKING_TOKENS",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
]

# Each of the usual tools has a variable of its own for the same file.
CA_BUNDLE_NAMES = [
    "NODE_EXTRA_CA_CERTS",
    "SSL_CERT_FILE",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
]


def passed_on(names: Iterable[str], extra: Mapping[str, str]) -> dict[str, str]:
    """Those variables of the server's environment that runs may see, then the configured ones."""
    return {name: os.environ[name] for name in names if os.environ.get(name)} | dict(extra)


NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
# The shell that starts Claude would stumble over these; nobody sets them in earnest.
NOT_SETTABLE = {"PPID", "UID", "EUID", "OPTIND", "SHELLOPTS", "BASHOPTS", "BASH_VERSINFO", "_"}


def settable(name: str) -> bool:
    return bool(NAME.fullmatch(name)) and name not in NOT_SETTABLE


def for_run(ours: Mapping[str, str], ca_bundle: str, dotenv: str) -> dict[str, str]:
    """All variables that a run gets beside those of the image. `ca_bundle` is a path in the container, or empty."""
    bundle = dict.fromkeys(CA_BUNDLE_NAMES, ca_bundle) if ca_bundle else {}
    return {name: value for name, value in {**bundle, **ours, **read(dotenv)}.items() if settable(name)}


def read(text: str) -> dict[str, str]:
    """Variables of a `.env` text. `${NAME}` is not expanded: that would reach into the server's environment."""
    bindings = parse_stream(io.StringIO(text))
    return {b.key: b.value for b in bindings if b.key and settable(b.key) and b.value is not None}


def edit(text: str, changes: Mapping[str, str | None]) -> str:
    """The `.env` text with variables set, or unset where the value is None; all other lines stay as they are."""
    kept = "".join(b.original.string for b in parse_stream(io.StringIO(text)) if b.key not in changes)
    # What is new comes first: a quote that is never closed would take in what follows it.
    return "".join(f"{key}={_quote(value)}\n" for key, value in changes.items() if value is not None) + kept


def _quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
