from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from api_server import TOKEN, Api, calls, says, server_file
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client import AsyncKernelManager

from jupyter_agents import magic
from jupyter_agents.client import AgentsError, Client, RunHandle
from jupyter_agents.magic import CellView, variable_file
from jupyter_agents.transcript import Text, Tool, Transcript

pytest_plugins = ["client_fixtures"]


@pytest.fixture
def shell(served: Api, home: Path) -> Iterator[InteractiveShell]:
    """A terminal's IPython that has the extension loaded and finds the server."""
    os.environ["JPY_PARENT_PID"] = "12345678"
    server_file(home, served, 12345678)
    made = InteractiveShell.instance()
    made.run_line_magic("load_ext", "jupyter_agents")
    yield made
    del os.environ["JPY_PARENT_PID"]
    made.reset()
    made.history_manager.end_session()
    InteractiveShell.clear_instance()


Told = pytest.CaptureFixture[str]


def run(shell: InteractiveShell, cell: str) -> Any:
    """Run a cell as a user does."""
    return shell.run_cell(cell, store_history=False)


def refused(shell: InteractiveShell, cell: str, told: Told) -> str:
    """The sentence that a cell which must fail shows, in which no traceback is."""
    told.readouterr()
    result = run(shell, cell)
    assert isinstance(result.error_in_exec, AgentsError)
    shown = "".join(told.readouterr())
    assert "Traceback" not in shown and "File " not in shown
    assert str(result.error_in_exec) in shown
    return str(result.error_in_exec)


# --- %agent -----------------------------------------------------------------------------------------------------


def test_help(shell: InteractiveShell, capsys: Told) -> None:
    for line in ("%agent", "%agent help", "%agent --help"):
        run(shell, line)
        shown = capsys.readouterr().out
        assert all(
            verb in shown
            for verb in [
                "create",
                "list",
                "rm",
                "status",
                "image",
                "runs",
                "log",
                "stop",
                "env",
                "files",
                "get",
                "put",
                "diff",
                "panel",
            ]
        )
        assert "%%agent NAME" in shown
    run(shell, "%agent env --help")
    assert "values are never shown" in capsys.readouterr().out
    run(shell, "%%agent --help\nx")
    assert "--max-turns N" in capsys.readouterr().out


def test_a_day_with_an_agent(shell: InteractiveShell, served: Api, capsys: Told, tmp_path: Path) -> None:
    def says_of(line: str) -> str:
        capsys.readouterr()
        assert run(shell, line).success
        return capsys.readouterr().out.rstrip("\n")

    assert says_of("%agent list") == "No agents yet."
    assert says_of("%agent create bot") == "Agent bot is ready."
    assert says_of("%agent runs") == "No runs yet."
    assert says_of("%agent files bot") == "No files."
    (tmp_path / "my data.csv").write_text("1,2")
    assert says_of(f"%agent put bot '{tmp_path}/my data.csv' in/") == "Agent bot has it as in/my data.csv"
    assert "in/my data.csv  3 bytes  1970-01-01" in says_of("%agent files bot")
    shell.user_ns["where"] = str(tmp_path / "copy.csv")
    assert says_of("%agent get bot 'in/my data.csv' {where}") == f"Saved as {tmp_path}/copy.csv"
    assert (tmp_path / "copy.csv").read_text() == "1,2"
    served.script = lambda run: served.add(run, *says("Hello"), *calls("Bash", {"command": "ls -l"}))
    assert run(shell, "%%agent bot -b\ngreet").result.status == "running"
    assert re.search(
        r"memory +312 MB of 1 GB\n.*1 of 10\n.*1 of 3\n  bot +2025\S+  running for", says_of("%agent status")
    )
    assert says_of("%agent list").startswith("bot  running  … running")
    assert says_of("%agent stop bot").startswith("Run 20250101-000000-00000000 of bot: ✗ cancelled in 1.5 s")
    assert says_of("%agent log bot").startswith("Hello\n● Bash ls -l\n✗ cancelled")
    assert says_of("%agent log 20250101-000000-00000000").startswith("Hello\n")
    assert says_of("%agent runs bot").startswith("20250101-000000-00000000  bot  ✗ cancelled")
    assert says_of("%agent diff bot") == "The last run changed nothing."
    served.diff = "--- a/x\n+++ b/x\n\x1b[31m-red\n"
    assert says_of("%agent diff bot") == "--- a/x\n+++ b/x\n-red"
    assert says_of("%agent image scientific") == "   standard\n*  scientific"
    assert says_of("%agent rm bot") == "Agent bot and its files are removed."


def test_values_of_variables_are_taken_to_the_letter(
    shell: InteractiveShell, served: Api, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(shell, "%agent create bot")
    shell.user_ns["x"] = "expanded"
    run(shell, """%agent env bot A={x} B='$x $$ {"y": 1}' C=a=b""")
    assert served.env["bot"] == {"A": "{x}", "B": '$x $$ {"y": 1}', "C": "a=b"}
    monkeypatch.setattr("getpass.getpass", lambda prompt: f"asked for {prompt}")
    capsys.readouterr()
    run(shell, "%agent env bot KEY -u A -u B")
    assert served.env["bot"] == {"C": "a=b", "KEY": "asked for KEY: "}
    assert capsys.readouterr().out == "C\nKEY\n"


def test_mistakes_on_the_line(shell: InteractiveShell, served: Api, capsys: Told) -> None:
    assert "Unrecognized arguments: --colour" in refused(shell, "%agent list --colour", capsys)
    assert "`%agent create --help`" in refused(shell, "%agent create", capsys)
    assert "write %%agent bot with the prompt below it" in refused(shell, "%agent bot do this", capsys)
    assert "No closing quotation in" in refused(shell, "%agent create 'x", capsys)
    assert "There is no agent nobody" in refused(shell, "%agent files nobody", capsys)
    assert "no file" in refused(shell, "%agent get nobody x", capsys) or served.agents == {}
    assert "/no/such: No such file" in refused(shell, "%agent put bot /no/such", capsys)
    assert "is no name for an agent" in refused(shell, "%agent create ../x", capsys)
    run(shell, "%agent create bot")
    assert "already" in refused(shell, "%agent create bot", capsys)
    assert "Agent bot has not run yet." in refused(shell, "%agent log bot", capsys)


# --- %%agent ----------------------------------------------------------------------------------------------------


def test_a_prompt_in_a_terminal(shell: InteractiveShell, served: Api, capsys: Told) -> None:
    def script(run: str) -> None:
        served.add(run, *says("I look: **\x1b[31mnow**"), *calls("Bash", {"command": "ls\nx"}, "out"), *says("Done."))
        served.end(run)

    served.script = script
    result = run(shell, "%%agent bot -o answer\nPrint {braces} and $dollars and %percent\n  kept\n")
    assert served.requests == [{"prompt": "Print {braces} and $dollars and %percent\n  kept"}]
    assert capsys.readouterr().out.startswith(
        "I look: **now**\n● Bash ls x\nDone.\n✓ succeeded in 1.5 s · 2 turns · $0.0123 · 1,234 tokens in, 56 out\n"
    )
    assert isinstance(result.result, RunHandle)
    assert shell.user_ns["answer"] is result.result
    assert result.result.text == "Done."


def test_options_become_a_request(shell: InteractiveShell, served: Api) -> None:
    run(shell, "%agent create bot")
    shell.user_ns["which"] = "opus"
    run(
        shell,
        "%%agent -n bot -m {which} --max-turns 3 --max-budget 0.5 --timeout 60 --permission-mode plan\n-n is text too",
    )
    assert served.requests == [
        {
            "prompt": "-n is text too",
            "continue": False,
            "model": "opus",
            "max_turns": 3,
            "max_budget_usd": 0.5,
            "timeout": 60.0,
            "permission_mode": "plan",
        }
    ]


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("%%agent bot --colour\nx", "Unrecognized arguments: --colour"),
        ("%%agent bot -x\nx", "Unrecognized arguments: -x"),
        ("%%agent bot --max\nx", "Unrecognized arguments: --max"),
        ("%%agent create bot\nx", "Unrecognized arguments: bot"),
        ("%%agent\nx", "required: NAME"),
        ("%%agent bot --max-turns many\nx", "invalid int value: 'many'"),
        ("%%agent bot --permission-mode root\nx", "invalid choice: 'root'"),
        ("%%agent bot\n \n", "The prompt is empty"),
        ("%%agent bot -i nothing\nx", "-i nothing: there is no variable of that name."),
        ("%%agent bot -o 1x\nx", "-o 1x: that is not the name of a variable."),
        ("%%agent Bot\nx", "is no name for an agent"),
    ],
)
def test_mistakes_in_a_cell(shell: InteractiveShell, served: Api, capsys: Told, cell: str, sentence: str) -> None:
    assert sentence in refused(shell, cell, capsys)
    assert served.requests == []


def test_a_run_that_failed_fails_the_cell(shell: InteractiveShell, served: Api, capsys: Told) -> None:
    served.script = lambda run: served.end(run, "failed", "Invalid API key; set another one.")
    assert refused(shell, "%%agent bot -o it\nx", capsys) == "Invalid API key; set another one."
    assert shell.user_ns["it"].status == "failed"


def test_a_busy_agent(shell: InteractiveShell, served: Api, capsys: Told) -> None:
    served.script = lambda run: None
    handle = run(shell, "%%agent bot -b\nx").result
    assert "busy" in refused(shell, "%%agent bot\ny", capsys)
    assert handle.cancel().status == "cancelled"


def interrupt_when(true: Any) -> threading.Thread:
    def wait() -> None:
        while not true():
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_an_interrupt_cancels_the_run(shell: InteractiveShell, served: Api, capsys: Told) -> None:
    served.script = lambda run: served.add(run, *says("Working"))
    thread = interrupt_when(lambda: served.sockets)
    assert refused(shell, "%%agent bot\nx", capsys) == "The run was cancelled."
    thread.join()
    [info] = served.runs.values()
    assert info["state"] == "cancelled"


def test_an_interrupt_while_a_run_is_being_started_cancels_it(
    shell: InteractiveShell, served: Api, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Client.start_run

    def start_and_be_interrupted(*args: Any, **options: Any) -> None:
        start(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "start_run", start_and_be_interrupted)
    served.script = lambda run: None
    assert refused(shell, "%%agent bot\nx", capsys) == "Interrupted."
    [info] = served.runs.values()
    assert info["state"] == "cancelled"


def test_variables_are_given_as_files(shell: InteractiveShell, served: Api, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("# R")
    shell.user_ns.update(text="a\nü", table=[{"a": 1}], report=tmp_path / "report.md")
    run(shell, "%%agent bot -i text -i table -i report\nSum {table} up")
    assert served.files["bot"] == {
        "inputs/text.txt": "a\nü".encode(),
        "inputs/table.json": b'[\n {\n  "a": 1\n }\n]',
        "inputs/report.md": b"# R",
    }
    assert served.requests[0]["prompt"] == (
        "Sum {table} up\n\nThese files, relative to your working directory, hold what the user gave you:\n"
        "- inputs/text.txt: `text`, a text\n- inputs/table.json: `table`, as JSON\n"
        "- inputs/report.md: the file `report`"
    )


def test_arrays_and_frames_as_files() -> None:
    import io

    import numpy as np
    import pandas as pd

    about, data, path = variable_file("a", np.arange(6).reshape(2, 3))
    assert (about, path) == ("`a`, a numpy array of shape (2, 3) and type int64", "inputs/a.npy")
    assert isinstance(data, bytes) and np.load(io.BytesIO(data)).tolist() == [[0, 1, 2], [3, 4, 5]]
    frame = pd.DataFrame({"x": [1, 2], "y": ["a", "b"]})
    about, data, path = variable_file("f", frame)
    assert (about, path) == ("`f`, a pandas DataFrame of 2 rows and 2 columns, as Parquet", "inputs/f.parquet")
    assert isinstance(data, bytes) and pd.read_parquet(io.BytesIO(data)).equals(frame)
    about, data, path = variable_file("m", pd.DataFrame({"mixed": [1, "a", {2}]}))
    assert (data, path) == (b"mixed\n,1\n"[:0] + b",mixed\n0,1\n1,a\n2,{2}\n", "inputs/m.csv")
    assert variable_file("s", frame["x"])[2] == "inputs/s.parquet"
    with pytest.raises(AgentsError, match="array of Python objects"):
        variable_file("o", np.array([{}, None]))


def test_a_frame_without_pyarrow_is_csv(monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    for name in ("pyarrow", "pyarrow.parquet", "fastparquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert variable_file("f", pd.DataFrame({"x": [1]}))[2] == "inputs/f.csv"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (object(), "a object can't be given to an agent"),
        ({"a": object()}, "can't be written as JSON"),
        (Path("/no/such"), "there is no file /no/such"),
    ],
)
def test_what_cannot_be_given(value: object, sentence: str) -> None:
    with pytest.raises(AgentsError, match=f"-i v: .*{sentence}"):
        variable_file("v", value)


def test_small_values_as_files() -> None:
    assert variable_file("b", b"\0")[1:] == (b"\0", "inputs/b.bin")
    assert variable_file("n", None)[1:] == (b"null", "inputs/n.json")
    assert variable_file("t", (1, 2.5, True))[2] == "inputs/t.json"


# --- completion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "absent"),
    [
        ("%agent ", {"create", "list", "panel", "help"}, {"bot"}),
        ("%agent st", {"status", "stop"}, {"create"}),
        ("%agent rm ", {"bot", "bee"}, set()),
        ("%agent rm be", {"bee"}, {"bot"}),
        ("%agent env bot --u", {"--unset"}, set()),
        ("%%agent b", {"bot", "bee"}, set()),
        ("%%agent bot --max", {"--max-turns", "--max-budget"}, {"--new"}),
        ("%%agent bot -i my_", {"my_variable"}, {"bot"}),
        ("%agent nonsense ", set(), {"bot"}),
    ],
)
def test_completion(shell: InteractiveShell, text: str, expected: set[str], absent: set[str]) -> None:
    run(shell, "%agent create bot\n%agent create bee\nmy_variable = 1")
    matches = completions(shell, text)
    assert expected <= matches
    assert not absent & matches


def completions(shell: InteractiveShell, text: str) -> set[str]:
    with provisionalcompleter():
        return {completion.text for completion in shell.Completer.completions(text, len(text))}


def test_completion_starts_no_server(shell: InteractiveShell, served: Api) -> None:
    assert "--help" in completions(shell, "%agent rm ")
    assert served.seen == []


# --- the cell's output ------------------------------------------------------------------------------------------


class Outputs:
    """What a notebook would show, kept by output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[dict[str, str]] = []
        self.updates = 0

        def display(bundle: dict[str, str], raw: bool, display_id: bool) -> Any:
            outputs, number = self, len(self.shown)
            self.shown.append(bundle)

            class Handle:
                def update(self, bundle: dict[str, str], raw: bool) -> None:
                    outputs.shown[number] = bundle
                    outputs.updates += 1

            return Handle()

        monkeypatch.setattr(magic, "display", display)


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> Outputs:
    monkeypatch.setattr(magic, "UPDATE_SECONDS", -1)
    return Outputs(monkeypatch)


@pytest.fixture
def handle(client: Client) -> RunHandle:
    return client.start_run("bot", "x").wait()


def test_pages_that_are_full_and_done_are_not_sent_again(outputs: Outputs, handle: RunHandle) -> None:
    view, told = CellView(handle), Transcript()
    for n in range(45):
        told.items.append(Tool("Bash", f"step {n}", "", result=""))
    view.show(told, "312 MB of 1 GB")
    assert outputs.shown[0]["text/plain"].endswith("running for 0.0 s · 312 MB of 1 GB")
    assert [page["text/plain"].count("\n") + 1 for page in outputs.shown[1:]] == [20, 20, 5]
    outputs.updates = 0
    told.items.append(Text("more", done=True))
    view.show(told, "312 MB of 1 GB")
    assert outputs.updates == 1
    view.finish(told, handle)
    assert outputs.shown[0]["text/plain"].startswith("bot: ✓ succeeded in 1.5 s")
    assert outputs.shown[0]["text/plain"].endswith("peak 400 MB")


def test_a_late_result_updates_its_page(outputs: Outputs, handle: RunHandle) -> None:
    view, told = CellView(handle), Transcript()
    slow = Tool("Task", "slow", "")
    told.items.extend([slow, *(Tool("Bash", "x", "", result="") for _ in range(30))])
    view.show(told, "")
    assert "slow</code> …" in outputs.shown[1]["text/markdown"]
    slow.result = "at last"
    view.show(told, "")
    assert "at last" in outputs.shown[1]["text/markdown"]


def test_a_megabyte_stays_small(outputs: Outputs, handle: RunHandle) -> None:
    view, told = CellView(handle), Transcript()
    for n in range(2000):
        told.items.append(Text(f"{n} " + "x" * 1000, done=True))
        view.show(told, "")
    told.items.append(Text("y" * 2**20, done=True))
    view.finish(told, handle)
    assert len(outputs.shown) == magic.PAGES + 1
    assert sum(len(json.dumps(bundle)) for bundle in outputs.shown) < 1_000_000
    assert "earlier steps are left out" in outputs.shown[-1]["text/plain"]


def test_updates_are_throttled(monkeypatch: pytest.MonkeyPatch, handle: RunHandle) -> None:
    outputs = Outputs(monkeypatch)
    view, told = CellView(handle), Transcript([Text("")])
    began = time.monotonic()
    while time.monotonic() - began < 1:
        told.items[0].text += "x"  # type: ignore[union-attr]
        view.show(told, "")
        time.sleep(0.001)
    assert 2 <= outputs.updates <= 10


# --- in a real kernel -------------------------------------------------------------------------------------------


def execute(home: Path, *cells: str) -> Any:
    """The notebook with its outputs, executed by a real kernel."""
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    return asyncio.run(NotebookClient(notebook, timeout=60, allow_errors=True).async_execute())


def test_a_notebook(served: Api, home: Path) -> None:
    def script(run: str) -> None:
        if "fail" in served.runs[run]["prompt"]:
            served.end(run, "failed", "It <failed>.")
            return
        served.add(run, *says("Look <script>x</script> at `a<b`:\n```python\n1 < 2\n```"))
        served.add(run, *calls("Bash", {"command": "ls"}, "<out>\n\nput"))
        served.end(run)

    served.script = script
    server_file(home, served, os.getpid())
    notebook = execute(
        home,
        "%load_ext jupyter_agents",
        "%%agent bot -o it\ngo",
        "it.text",
        "%%agent bot\nfail",
        "%agent diff bot",
        "%agent log bot",
    )
    _, going, text, failing, changes, log = [cell.outputs for cell in notebook.cells]
    head, page, result = going
    assert head.data["text/plain"].startswith("bot: ✓ succeeded in 1.5 s · 2 turns · &#36;"[:30])
    assert head.data["text/markdown"].startswith("**bot** ✓ succeeded in 1.5 s · 2 turns · &#36;0.0123")
    assert page.data["text/plain"] == "Look <script>x</script> at `a<b`:\n```python\n1 < 2\n```\n● Bash ls"
    assert page.data["text/markdown"].startswith(
        "Look &lt;script>x&lt;/script> at <code>a&#60;b</code>:\n\n```python\n"
    )
    assert page.data["text/markdown"].endswith("&#60;out&#62;&#10;&#10;put</pre></details>")
    assert result.data["text/plain"] == "<run 20250101-000000-00000000 of bot: succeeded>"
    assert text[0].data["text/plain"] == "'Done.'"
    error = failing[-1]
    assert (error.ename, error.evalue, error.traceback) == ("AgentsError", "It <failed>.", ["It <failed>."])
    assert changes[0].text == "The last run changed nothing.\n"
    assert log[-1].text.startswith("✗ failed in 1.5 s")
    assert TOKEN not in nbformat.writes(notebook)


def test_a_notebook_is_readable_in_other_forms(served: Api, home: Path) -> None:
    from nbconvert import HTMLExporter, MarkdownExporter

    served.script = lambda run: (served.add(run, *says("**Bold** <img src=x onerror=alert(1)>")), served.end(run))[0]
    server_file(home, served, os.getpid())
    notebook = execute(home, "%load_ext jupyter_agents", "%%agent bot\ngo")
    html, _ = HTMLExporter().from_notebook_node(notebook)
    assert "<strong>Bold</strong> &lt;img src=x onerror=alert(1)&gt;" in html
    markdown, _ = MarkdownExporter().from_notebook_node(notebook)
    assert "**Bold** &lt;img" in markdown


def test_interrupting_the_kernel_cancels_the_run(served: Api, home: Path) -> None:
    served.script = lambda run: served.add(run, *says("Working"))
    server_file(home, served, os.getpid())
    reply, messages = asyncio.run(interrupt(served))
    assert reply["content"]["evalue"] == "The run was cancelled."
    shown = [m["content"]["data"]["text/plain"] for m in messages if "data" in m["content"]]
    assert any(text.startswith("bot: ✗ cancelled") for text in shown)
    assert "Working" in shown
    assert [m["content"]["traceback"] for m in messages if m["msg_type"] == "error"] == [["The run was cancelled."]]
    assert next(iter(served.runs.values()))["state"] == "cancelled"


async def interrupt(served: Api) -> tuple[Any, list[dict[str, Any]]]:
    """A kernel's reply and messages for a cell that is interrupted while its run goes on."""
    manager = AsyncKernelManager()
    await manager.start_kernel()
    kernel = manager.client()
    kernel.start_channels()
    try:
        await kernel.wait_for_ready(timeout=60)
        await kernel.execute_interactive("%load_ext jupyter_agents", timeout=60)
        messages: list[dict[str, Any]] = []
        cell = kernel.execute_interactive("%%agent bot\nwork", timeout=60, output_hook=messages.append)
        running = asyncio.ensure_future(cell)
        while not served.sockets:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        await manager.interrupt_kernel()
        return await running, messages
    finally:
        kernel.stop_channels()
        await manager.shutdown_kernel(now=True)
