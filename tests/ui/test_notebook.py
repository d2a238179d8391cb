"""Agents in a notebook that is open in JupyterLab: cells, and the panel of ipywidgets."""

from __future__ import annotations

import json
from collections.abc import Callable

import nbformat
from conftest import ROOT
from playwright.sync_api import expect

from .conftest import SECONDS, Lab, View, notebook

Look = Callable[..., View]


def opened(look: Look, lab: Lab, name: str, *cells: str) -> View:
    return run_all(look, lab, name, notebook(*cells))


def run_all(look: Look, lab: Lab, name: str, content: str) -> View:
    (lab.work / f"{name}.ipynb").write_text(content)
    view = look(f"lab/tree/{name}.ipynb?reset")
    expect(view.page.locator(".jp-Notebook .jp-Cell").first).to_be_visible()
    view.page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
        timeout=90 * SECONDS,
    )
    view.command("notebook:run-all-cells")
    return view


def test_a_cell_streams_and_its_interruption_cancels_the_run(look: Look, lab: Lab) -> None:
    view = opened(look, lab, "cell", "%load_ext jupyter_agents", "%%agent cells\n[[slow 400 0.3]]")
    output = view.page.locator(".jp-Cell-outputArea").last
    expect(output).to_contain_text("word003")
    expect(output).to_contain_text("running")
    view.command("notebook:interrupt-kernel")
    expect(output).to_contain_text("cancelled")
    expect(output).not_to_contain_text("Traceback")
    view["agent-select"].filter(has_text="cells").click()
    view.outcome("Stopped")
    assert lab.call("GET", "runs?agent=cells").json()[0]["state"] == "cancelled"


def test_what_a_cell_shows(look: Look, lab: Lab) -> None:
    prompt = "Write a Python script that prints the first primes, and run it."
    view = opened(look, lab, "primes", "%load_ext jupyter_agents", f"%%agent primes\n{prompt}")
    output = view.page.locator(".jp-Cell-outputArea").last
    expect(output).to_contain_text("2 3 5 7 11 13 17 19 23 29")
    expect(output).to_contain_text("succeeded")
    expect(output.locator("table")).to_be_visible()
    call = output.locator("details", has_text="primes.py 10")
    call.locator("summary").click()
    expect(call).to_contain_text("2 3 5 7 11")
    view.picture("magic")


def test_the_panel_of_ipywidgets(look: Look, lab: Lab) -> None:
    view = opened(look, lab, "widgets", "%load_ext jupyter_agents", "%agent panel")
    panel = view.page.locator(".jp-OutputArea .jupyter-widgets").first
    expect(panel).to_contain_text("MB of 1 GB")
    panel.locator("input[type=text]").first.fill("gadget")
    panel.get_by_role("button", name="Create").click()
    expect(panel.locator("select")).to_contain_text("gadget")
    panel.locator("textarea").fill("[[say hello from a widget]]")
    panel.get_by_role("button", name="Run").click()
    expect(panel).to_contain_text("hello from a widget")
    expect(panel).to_contain_text("succeeded")
    view.picture("widgets")


def test_the_demo_runs_from_top_to_bottom(look: Look, lab: Lab) -> None:
    """The main job: a notebook in a real server runs the real CLI in a real container, and reads back what it wrote."""
    demo = nbformat.read(ROOT / "demo" / "demo.ipynb", as_version=4)
    view = run_all(look, lab, "demo", nbformat.writes(demo))
    ran = sum(cell.cell_type == "code" for cell in demo.cells)
    # JupyterLab draws only the cells in sight, but its model has them all.
    view.page.wait_for_function(
        "count => [...window.jupyterapp.shell.currentWidget.content.model.cells]"
        ".filter(cell => cell.executionCount).length === count",
        arg=ran,
        timeout=120 * SECONDS,
    )
    view.command("docmanager:save")
    expect(view.page.locator(".jp-mod-dirty")).to_have_count(0)
    cells = nbformat.read(lab.work / "demo.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    text = json.dumps(outputs)
    for expected in (
        "The model is SCRIPTED",
        "2 3 5 7 11 13 17 19 23 29",
        "def primes(count)",
        "'column': 'temperature'",
        "Your first prompt",
    ):
        assert expected in text, expected
