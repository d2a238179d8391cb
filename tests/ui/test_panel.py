"""The side panel as its users meet it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest
from conftest import ROOT
from helpers import IMAGE, another_name
from playwright.sync_api import Browser, WebSocketRoute, expect

from .conftest import Lab, View, notebook

Look = Callable[..., View]


def test_first_steps_of_a_newcomer(look: Look, lab: Lab) -> None:
    view = look()
    expect(view["agents"]).to_contain_text("Name one, tell it what to do")
    expect(view["image"]).to_have_count(0)
    view["create-name"].fill("My Agent")
    expect(view["#jp-agents-create-hint"]).to_contain_text("lower-case letters")
    view.create("primes")
    expect(view["transcript"]).to_contain_text("has a folder of its own")
    view.run("Write a Python script that prints the first primes, and run it.")
    expect(view["scroller"]).to_contain_text("2 3 5 7 11 13 17 19 23 29")
    expect(view["scroller"].locator("table")).to_be_visible()
    expect(view["outcome"]).to_contain_text(re.compile(r"\$0\.\d+ · [\d,]+ tokens in, \d+ out · \d turns"))
    call = view["tool"].filter(has_text="python3 primes.py")
    expect(call.locator("pre").last).not_to_be_visible()
    call.locator("summary").click()
    expect(call.locator("pre").last).to_contain_text("2 3 5 7")
    view.widen()
    view.picture("panel")

    view.tab("changes")
    expect(view["diff"]).to_have_count(1)
    expect(view["diff"]).to_contain_text("primes.py")
    expect(view["diff-added"]).to_have_text(re.compile(r"\+1\d"))
    view.tab("files")
    expect(view["files"]).to_contain_text("primes.py")
    view["files"].get_by_text("primes.py").dblclick()
    editor = view.page.locator(".jp-FileEditor .cm-content")
    expect(editor).to_contain_text("def primes(count)")
    editor.click()
    view.page.keyboard.press("Control+Home")
    view.page.keyboard.type("# mine\n")
    view.page.keyboard.press("Control+s")
    expect(view.page.locator(".jp-mod-dirty")).to_have_count(0)
    assert lab.call("GET", "agents/primes/files/primes.py").text.startswith("# mine\n")

    view.tab("run")
    view.prompt("[[sleep 60]]")
    expect(view["outcome"]).to_contain_text("time.sleep(60.0)")
    expect(view["#jp-agents-prompt-hint"]).to_contain_text("primes works")
    view["stop"].click()
    view.outcome("Stopped")
    view["runs"].select_option(index=1)
    expect(view["scroller"]).to_contain_text("2 3 5 7 11 13 17 19 23 29")


def test_a_reload_and_a_second_tab_in_mid_run(look: Look) -> None:
    view = look()
    view.create("slow")
    view.prompt("[[slow 400 0.3]]")
    expect(view["text"]).to_contain_text("word003")
    other = look()
    view.page.reload()
    view.show()
    for each in (view, other):
        expect(each["outcome"]).to_contain_text("Running")
        expect(each["text"]).to_contain_text("word009")
    other["stop"].click()
    for each in (view, other):
        each.outcome("Stopped")
    assert view["text"].inner_text() == other["text"].inner_text()
    other["create-name"].fill("second")
    other["create-name"].press("Enter")
    expect(view["agent-name"]).to_have_text(["second", "slow"])


def test_the_server_dies_and_comes_back_in_mid_run(look: Look, lab: Lab) -> None:
    view = look()
    view.create("steady")
    view.prompt("[[slow 20 0.5]] [[say arrived]]")
    expect(view["text"]).to_contain_text("word002")
    lab.kill()
    expect(view["connection"]).to_contain_text("does not answer. Agents that run go on")
    lab.start()
    expect(view["connection"]).to_have_count(0)
    view.outcome("Succeeded")
    expect(view["scroller"]).to_contain_text("arrived")
    text = view["scroller"].inner_text()
    assert text.count("arrived") == 2  # in the prompt and in the answer: nothing came twice


def test_memory_is_shown_and_its_end_told(look: Look, lab: Lab) -> None:
    view = look()
    view.create("greedy")
    expect(view["memory-figures"]).to_have_text(re.compile(r"\d+ MB of 1 GB"))
    view.prompt("[[allocate 690 8]]")
    expect(view["memory-level"]).to_contain_text("High: further runs may not fit")
    expect(view["shares"]).to_contain_text("greedy")
    expect(view[".jp-agents-memory"]).to_have_attribute("data-level", "warning")
    panel, button = view[".jp-agents-panel"].bounding_box(), view["run"].bounding_box()
    assert panel and button and button["x"] + button["width"] <= panel["x"] + panel["width"]  # Stop stands beside it
    view.picture("memory")
    view.outcome("Succeeded")
    view.run("[[allocate 1500 5]]")
    expect(view["outcome"]).to_contain_text("process was killed during this run")
    expect(view[".jp-agents-memory"]).to_contain_text("killed")
    expect(view.page.locator(".jp-StatusBar-Widget, #jp-main-statusbar")).to_contain_text(re.compile("MB / 1 GB"))


def test_limits_say_why_a_control_is_off(look: Look, lab: Lab) -> None:
    for number in range(10):
        assert lab.call("POST", "agents", json={"id": f"a{number}"}).status_code == 201
    view = look()
    expect(view["count"]).to_have_text("10 of 10")
    expect(view["#jp-agents-create-hint"]).to_contain_text("All 10 agents exist. Remove one")
    for number in range(3):
        assert lab.call("POST", f"agents/a{number}/runs", json={"prompt": "[[sleep 60]]"}).status_code == 201
    view["agent-select"].filter(has_text="a5").click()
    view["prompt-text"].fill("one more")
    expect(view["#jp-agents-prompt-hint"]).to_contain_text(
        "3 of 3 runs are active. Wait for one or stop it: a0, a1, a2."
    )
    expect(view["run"]).to_be_disabled()
    view.page.get_by_label("Remove a0").click()
    dialog = view.page.locator(".jp-Dialog")
    expect(dialog).to_contain_text("Its run is stopped.")
    dialog.get_by_role("button", name="Remove").click()
    expect(view["agent-name"]).to_have_count(9)
    expect(view["run"]).to_be_enabled()


def test_hostile_output_is_text(look: Look) -> None:
    view = look()
    dialogs: list[Any] = []
    view.page.on("dialog", lambda dialog: dialogs.append(dialog.message) or dialog.dismiss())
    view.create("evil")
    view.run("[[hostile]]")
    title = view.page.title()
    hrefs = view["scroller"].locator("a").evaluate_all("links => links.map(link => link.getAttribute('href') || '')")
    assert not any(href.strip().lower().startswith(("javascript:", "data:text")) for href in hrefs)
    assert view["scroller"].locator("script, iframe, object, embed, [onerror], [onclick]").count() == 0
    for link in view["scroller"].locator("a").all():
        link.evaluate(
            "link => link.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true, ctrlKey: true}))"
        )
    assert "\x1b" not in view["scroller"].inner_text()
    assert view.page.title() == title
    assert "pwned" not in title
    assert dialogs == []


def test_much_output_does_not_freeze_the_tab(look: Look) -> None:
    view = look()
    view.create("much")
    view.page.evaluate(
        """() => {
        window.worst = 0;
        let last = performance.now();
        setInterval(() => {
            const now = performance.now();
            window.worst = Math.max(window.worst, now - last);
            last = now;
        }, 20);
        }"""
    )
    view.run("[[events 10000]]")
    expect(view["scroller"]).to_contain_text("0000000")
    view.run("[[big 5]]")
    expect(view["scroller"]).to_contain_text("All work and no play.")
    assert len(view["scroller"].inner_text()) < 1_000_000
    assert view.page.evaluate("() => window.worst") < 5000


def test_variables_are_write_only(look: Look, lab: Lab) -> None:
    view = look()
    view.create("keeper")
    view.tab("environment")
    expect(view["#jp-agents-env-note"]).to_contain_text("can read")
    view["env-name"].fill("1BAD")
    expect(view["#jp-agents-env-hint"]).to_contain_text("letters, digits")
    view["env-name"].fill("API_TOKEN")
    view["env-value"].fill("s3cret-value")
    view["env-value"].press("Enter")
    expect(view["names"]).to_contain_text("API_TOKEN")
    assert "s3cret-value" not in view.page.content()
    assert lab.call("GET", "agents/keeper/env").json() == ["API_TOKEN"]
    view.page.get_by_label("Remove API_TOKEN").click()
    expect(view["names"]).to_have_count(0)


def test_files_are_given_by_dropping_them(look: Look, lab: Lab) -> None:
    (lab.work / "note.txt").write_text("from the file browser")
    view = look()
    view.create("taker")
    view.page.evaluate(
        """() => {
        const data = new DataTransfer();
        data.items.add(new File(['from the desktop'], 'desk top.txt'));
        const agent = document.querySelector('.jp-agents-agent');
        for (const type of ['dragover', 'drop'])
            agent.dispatchEvent(new DragEvent(type, {dataTransfer: data, bubbles: true, cancelable: true}));
        }"""
    )
    expect(view.page.get_by_text("taker has desk top.txt.")).to_be_visible()
    assert lab.call("GET", "agents/taker/files/desk%20top.txt").text == "from the desktop"
    expect(view["memory-figures"]).not_to_have_text(re.compile("^0 B"))  # nothing new above the agents from here on
    view.page.locator(".jp-DirListing-item", has_text="note.txt").hover()
    view.page.mouse.down()
    view["create-name"].hover(force=True)  # what is dragged is above all
    view["agent"].hover(force=True)
    expect(view["agent"]).to_have_class(re.compile("jp-agents-drop"))
    view.page.mouse.up()
    expect(view.page.get_by_text("taker has note.txt.")).to_be_visible()
    assert lab.call("GET", "agents/taker/files/note.txt").text == "from the file browser"


def test_nothing_moves_when_memory_is_measured(look: Look, lab: Lab) -> None:
    for method in ("DELETE", "POST"):  # a container in which nothing was killed
        assert lab.call(method, "workspace").ok
    view = look()
    measured = False

    def pass_on(socket: WebSocketRoute) -> None:
        def receive(message: str | bytes) -> None:
            told = json.loads(message)
            if not measured and told["type"] == "state":
                told["workspace"]["memory"] = None
            if measured or told["type"] != "memory":
                socket.send(json.dumps(told))

        socket.connect_to_server().on_message(receive)

    view.page.route_web_socket(re.compile("/jupyter-agents/events"), pass_on)
    view.open()
    view.show()
    expect(view["plot"]).to_have_attribute("aria-label", "Memory has not been measured yet")
    before = view["agents"].bounding_box()
    measured = True
    expect(view["plot"]).to_have_attribute("aria-label", re.compile("between"))
    expect(view["memory-figures"]).not_to_have_text(re.compile("^0 B"))
    assert view["agents"].bounding_box() == before


def test_keyboard_alone(look: Look) -> None:
    view = look()
    view["create-name"].focus()
    keyboard = view.page.keyboard
    keyboard.type("keys")
    keyboard.press("Enter")
    expect(view["prompt-text"]).to_have_attribute("aria-label", "Prompt for keys")
    for _ in range(30):
        if view.page.evaluate("() => document.activeElement?.classList.contains('jp-agents-prompt-text')"):
            break
        keyboard.press("Tab")
    keyboard.type("[[sleep 60]]")
    keyboard.press("Control+Enter")
    expect(view["outcome"]).to_contain_text("Running")
    expect(view["stop"]).to_be_visible()
    keyboard.press("Control+.")
    view.outcome("Stopped")
    view["#jp-agents-tab-run"].focus()
    keyboard.press("ArrowRight")
    expect(view["#jp-agents-tab-files"]).to_be_focused()
    expect(view["files"]).to_be_visible()


def test_dark_theme(look: Look) -> None:
    view = look()
    view.create("night")
    view.run("Write a Python script that prints the first primes, and run it.")
    view.command("apputils:change-theme", theme="JupyterLab Dark")
    expect(view.page.locator("body[data-jp-theme-light=false]")).to_have_count(1)
    colours = view.page.evaluate(
        """() => ['.jp-agents-main', '.jp-agents-prompt-text', '.jp-agents-agent-name'].map(name => {
            const node = document.querySelector(name);
            return getComputedStyle(node).color;
        })"""
    )
    light = [sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 3 for colour in colours]
    assert min(light) > 150, colours  # light text: nothing kept a colour of the light theme
    view.widen()
    view.picture("panel-dark")


def test_accessibility(look: Look) -> None:
    view = look()
    view.create("clear")
    view.run("Write a Python script that prints the first primes, and run it.")
    view.page.add_script_tag(path=ROOT / ".dev" / "node_modules" / "axe-core" / "axe.min.js")
    for tab in ("run", "files", "changes", "environment"):
        view.tab(tab)
        view.page.wait_for_timeout(500)
        # The file browser in it is JupyterLab's.
        found = view.page.evaluate(
            "() => axe.run({include: ['.jp-agents-main']}).then(result => result.violations.map("
            "v => [v.impact, v.id, v.nodes.map(node => node.html).slice(0, 3)]))"
        )
        assert [one for one in found if one[0] in ("serious", "critical")] == [], tab


def test_a_run_that_ends_unseen_is_notified(look: Look) -> None:
    view = look()
    view.create("quiet")
    view.prompt("[[slow 6 0.5]]")
    expect(view["outcome"]).to_contain_text("Running")
    view.page.locator(".jp-SideBar .lm-TabBar-tab[title='Agents']").click()
    expect(view["main"]).not_to_be_visible()
    toast = view.page.locator(".Toastify__toast", has_text="quiet: Succeeded")
    expect(toast).to_be_visible()
    toast.get_by_role("button", name="Show").click()
    view.outcome("Succeeded")


def test_commands_and_insertion_into_a_notebook(look: Look) -> None:
    view = look()
    view.create("coder")
    view.run("Write a Python script that prints the first primes, and run it.")
    view.command("notebook:create-new", kernelName="python3")
    expect(view.page.locator(".jp-Notebook .jp-Cell")).to_have_count(1)
    view["outcome"].locator(".jp-agents-insert-markdown").click()
    expect(view.page.locator(".jp-MarkdownCell")).to_contain_text("Primes")
    commands = view.page.evaluate(
        "() => window.jupyterapp.commands.listCommands().filter(id => id.startsWith('jupyter-agents:'))"
    )
    assert set(commands) == {f"jupyter-agents:{name}" for name in ("show", "create", "run", "stop", "stop-workspace")}


def test_notebook_7(look: Look, lab: Lab) -> None:
    (lab.work / "seven.ipynb").write_text(notebook(""))
    view = look("notebooks/seven.ipynb")
    view.create("seven")
    view.run("[[say it works here too]]")
    expect(view["scroller"]).to_contain_text("it works here too")


@pytest.fixture
def other_image(user: str, docker_api: docker.APIClient) -> Iterator[str]:
    with another_name(docker_api, user) as image:
        yield image


def test_an_allowed_image_is_chosen(browser: Browser, start_lab: Callable[..., Lab], other_image: str) -> None:
    missing = "nobody/has-this:1"
    lab = start_lab(DockerEngine={"allowed_images": [other_image, missing]})
    view = View(browser, lab).show()
    choice = view["image"].locator("select")
    view.create("painter")
    expect(choice).to_have_value(IMAGE)
    choice.select_option(other_image)
    expect(choice).to_have_value(other_image)
    assert lab.call("GET", "workspace").json()["image"] == other_image
    expect(view["agent-name"]).to_have_text(["painter"])
    choice.select_option(missing)
    expect(view["image"]).to_contain_text(f"The image {missing} is missing: choose another one")
    expect(choice).to_have_value(other_image)
    view.prompt("[[sleep 60]]")
    expect(choice).to_be_disabled()
    view["stop"].click()
    expect(choice).to_be_enabled()
    view.close()


@pytest.mark.parametrize(
    ("config", "environment", "sentence", "command"),
    [
        ({"DockerEngine": {"image": "nobody/has-this:1"}}, {}, "is missing: build it once", "jupyter agents build"),
        ({}, {"DOCKER_HOST": "unix:///nowhere/docker.sock"}, "Docker doesn't answer", "start docker"),
    ],
)
def test_what_is_missing_is_said_with_the_command(
    browser: Browser,
    start_lab: Callable[..., Lab],
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    environment: dict[str, str],
    sentence: str,
    command: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    lab = start_lab(**config)
    view = View(browser, lab)
    view.page.locator(".jp-SideBar .lm-TabBar-tab[title='Agents']").click()
    problem = view["connection"].locator(".jp-agents-problem")
    expect(problem).to_contain_text(sentence)
    expect(problem).to_contain_text(command)
    expect(problem.get_by_role("button", name="Copy")).to_be_visible()
    view.close()
