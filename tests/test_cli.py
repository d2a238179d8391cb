from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from api_server import Api, calls, says, server_file

from jupyter_agents.cli import main, table

pytest_plugins = ["client_fixtures"]

Told = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def found(served: Api, home: Path) -> None:
    """The command line finds the server as one of the user's."""
    server_file(home, served, 12345678)


def ok(told: Told, *argv: str) -> str:
    told.readouterr()
    assert main(list(argv)) == 0
    return told.readouterr().out.rstrip("\n")


def answer(told: Told, *argv: str) -> Any:
    return json.loads(ok(told, *argv, "--json"))


def test_a_day_on_the_command_line(served: Api, capsys: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ok(capsys, "create", "bot") == "Agent bot is ready."
    assert [agent["id"] for agent in answer(capsys, "list")] == ["bot"]
    Path("in.txt").write_text("data")
    assert answer(capsys, "put", "bot", "in.txt", "deep/") == {"path": "deep/in.txt"}
    assert answer(capsys, "files", "bot")[0]["size"] == 4
    assert ok(capsys, "get", "bot", "deep/in.txt", "out.txt") == "Saved as out.txt"
    assert Path("out.txt").read_text() == "data"

    def script(run: str) -> None:
        served.add(run, *says("Hello."), *calls("Bash", {"command": "ls"}))
        served.end(run)

    served.script = script
    assert ok(capsys, "run", "bot", "greet", "-m", "opus").startswith("Hello.\n● Bash ls\n✓ succeeded in 1.5 s")
    assert served.requests == [{"prompt": "greet", "model": "opus"}]
    assert ok(capsys, "log", "bot").startswith("Hello.\n● Bash ls\n✓ succeeded")
    assert [event["type"] for event in answer(capsys, "log", "bot")][-1] == "run_end"
    assert [run["state"] for run in answer(capsys, "runs")] == ["succeeded"]
    served.diff = "+x\n"
    assert answer(capsys, "diff", "bot") == {"diff": "+x\n"}
    assert answer(capsys, "status")["limits"]["runs"] == 3
    assert ok(capsys, "image") == "*  standard\n   scientific"
    assert ok(capsys, "image", "scientific") == "   standard\n*  scientific"
    assert answer(capsys, "image")["image"] == "scientific"
    assert answer(capsys, "stop", "bot")["state"] == "succeeded"
    assert answer(capsys, "rm", "bot") is None


def test_a_run_makes_its_agent_and_answers_in_json(served: Api, capsys: Told) -> None:
    served.script = lambda run: (served.add(run, *says("Hello.")), served.end(run))[0]
    assert main(["run", "new", "greet", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["result"]["text"] == "Done."
    assert told.err.startswith("Hello.\n✓ succeeded")


def test_a_prompt_from_stdin_in_the_background(served: Api, capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    served.script = lambda run: None
    monkeypatch.setattr("sys.stdin", io.StringIO("do {this}\n--not-an-option\n"))
    assert ok(capsys, "run", "bot", "-b") == "20250101-000000-00000000"
    assert served.requests == [{"prompt": "do {this}\n--not-an-option\n"}]
    assert [run["id"] for run in answer(capsys, "runs", "bot")] == ["20250101-000000-00000000"]


def test_values_of_variables_are_read_from_stdin(served: Api, capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    ok(capsys, "create", "bot")
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin\n"))
    assert answer(capsys, "env", "bot", "KEY", "A=1") == ["A", "KEY"]
    assert served.env["bot"] == {"KEY": "from stdin", "A": "1"}
    assert ok(capsys, "env", "bot", "--unset", "KEY") == "A"
    assert ok(capsys, "env", "bot", "-u", "A") == "Agent bot has no variables."


@pytest.mark.parametrize(
    ("argv", "code", "sentence"),
    [
        ([], 2, "required: COMMAND"),
        (["dance"], 2, "invalid choice: 'dance'"),
        (["list", "--colour"], 2, "Unrecognized arguments: --colour"),
        (["rm"], 2, "required: NAME"),
        (["rm", "nobody"], 1, "There is no agent nobody; create it first."),
        (["put", "bot", "/no/such"], 1, "/no/such: No such file or directory."),
        (["run", "bot", " "], 1, "The prompt is empty"),
        (["log", "20250101-000000-ffffffff"], 1, "There is no run"),
    ],
)
def test_mistakes(capsys: Told, argv: list[str], code: int, sentence: str) -> None:
    assert main(argv) == code
    told = capsys.readouterr()
    assert sentence in told.err
    assert told.out == ""
    assert told.err.count("\n") == 1


def test_a_failed_run_fails_the_command(served: Api, capsys: Told) -> None:
    served.script = lambda run: served.end(run, "failed", "Bad key.")
    assert main(["run", "bot", "x"]) == 1
    assert capsys.readouterr().err == "Bad key.\n"


def test_an_interrupt_cancels_the_run(served: Api) -> None:
    served.script = lambda run: served.add(run, *says("Working"))
    command = [sys.executable, "-m", "jupyter_agents.cli", "run", "bot", "work"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "Working\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    assert out.startswith("✗ cancelled")


def test_doctor(served: Api, capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    shown = ok(capsys, "doctor")
    assert shown.count("✓") == 3
    assert "sk-secret" not in shown
    for name in [name for name in os.environ if name.startswith(("ANTHROPIC_", "CLAUDE_CODE_"))]:
        monkeypatch.delenv(name)
    problem = {"message": "Build it once.", "reason": "image_missing", "command": "jupyter agents build"}
    monkeypatch.setattr(served, "workspace", lambda: {"problem": problem})
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "✗ engine and image: Build it once.\n    jupyter agents build\n" in shown
    assert "✗ key: No key for Claude is set here" in shown
    assert main(["doctor", "--json"]) == 1
    assert [check["ok"] for check in json.loads(capsys.readouterr().out)] == [True, False, False]


def test_building_without_docker() -> None:
    # In a process of its own, since docker-py leaves its socket open.
    command = [sys.executable, "-m", "jupyter_agents.cli", "build"]
    environment = {**os.environ, "DOCKER_HOST": "unix:///no/such/socket"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("The Docker engine doesn't do it: start it")
    assert "Traceback" not in done.stderr


def test_table() -> None:
    assert table([("a", "bb", ""), ("ccc", "d", "e")]) == "a    bb\nccc  d   e"
    assert table([]) == ""


def test_nobody_to_ask(capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    ok(capsys, "create", "bot")
    monkeypatch.setattr("sys.stdin", None)
    assert main(["env", "bot", "KEY"]) == 1
    assert capsys.readouterr().err == "Nobody can be asked for KEY here: give it as KEY=VALUE.\n"
