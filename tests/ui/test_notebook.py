"""Agents in a notebook that is open in JupyterLab: cells, and the panel of ipywidgets."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import expect

from .conftest import SECONDS, Lab, View, notebook

Look = Callable[..., View]


def opened(look: Look, lab: Lab, name: str, *cells: str) -> View:
    (lab.work / f"{name}.ipynb").write_text(notebook(*cells))
    view = look(f"lab/tree/{name}.ipynb?reset")
    expect(view.page.locator(".jp-Notebook .jp-Cell")).to_have_count(len(cells))
    expect(view.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")).to_be_visible(timeout=90 * SECONDS)
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
