"""The API's contract, `openapi.yaml`, as the thing that request bodies are checked against."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from .errors import BadRequest

MAX_MEMBERS = 1000  # of a body
MAX_TOLD = 200  # characters of the names that a body holds
TEXT = (Path(__file__).parent / "openapi.yaml").read_text()


@cache
def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(TEXT)
    return loaded


@cache
def _validator(operation_id: str) -> Draft202012Validator:
    for operations in document()["paths"].values():
        for operation in operations.values():
            if isinstance(operation, dict) and operation.get("operationId") == operation_id:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                return Draft202012Validator({**schema, "components": document()["components"]})
    raise KeyError(operation_id)


def load(body: bytes) -> Any:
    """A request's JSON. Raises `BadRequest`."""
    try:
        return json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise BadRequest("The body of the request is not JSON.", "bad_request") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def check(operation_id: str, body: Any) -> dict[str, Any]:
    """The body, if the contract allows it for this operation. Raises `BadRequest`, which never repeats a value."""
    # Before the validator sees it, which looks at each member and writes out all of a body that it doesn't like.
    if not isinstance(body, dict):
        raise BadRequest("The body of the request is not a JSON object.", "bad_request")
    if len(body) > MAX_MEMBERS:
        raise BadRequest(f"The body of the request has more than {MAX_MEMBERS} members.", "bad_request")
    for error in _validator(operation_id).iter_errors(body):
        field = error.json_path.removeprefix("$").lstrip(".")[:MAX_TOLD] or "body"
        if error.validator in ("required", "additionalProperties"):
            raise BadRequest(f"The request is not as it should be: {error.message[:MAX_TOLD]}.", "bad_request")
        rule = f"{error.validator}: {error.validator_value}"
        raise BadRequest(f"`{field}` is not as it should be ({rule}).", "bad_request")
    return body
