"""What the report says where scripts are not allowed."""

import json
import re
from html.parser import HTMLParser

import pytest
from make_runs import completion_row, hostile_run, metrics_row, write_run

from vtfast.report import write_report

OURS = {"p", "h1", "h2", "code", "small", "figure", "figcaption", "div"}
OURS |= {"table", "thead", "tbody", "tr", "th", "td"}


class Text(HTMLParser):
    """The words inside of the page's noscript element, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words, self.tags = [], set()
        (inside,) = re.findall(r"<noscript>(.*?)</noscript>", page, re.DOTALL)
        self.feed(inside)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        if data.strip():
            self.words.append(data)

    def behind(self, *words: str) -> list[str]:
        """The cells behind a run of words."""
        starts = [i for i in range(len(self.words)) if self.words[i : i + len(words)] == list(words)]
        assert len(starts) == 1, (words, self.words)
        return self.words[starts[0] + len(words) :]


def page_of(*folders) -> Text:
    return Text(write_report(folders).read_text("utf-8"))


def test_result_settings_and_last_step(tmp_path):
    run = write_run(tmp_path / "mine", [metrics_row(step, kl=step / 8) for step in (1, 2, 3)])
    kinds = {"all": [0.25, 0.5], "count": [0.2, 0.4]}
    better = {"all": [0.75, 1.0], "count": [0.7, 0.9]}
    scores = {when: {"count": 40, "scores": {"greedy": part}} for when, part in (("before", kinds), ("after", better))}
    (run / "held_out.json").write_text(json.dumps(scores))
    text = page_of(run)
    assert text.behind("all")[:2] == ["0.25 → 0.75", "0.50 → 1.00"]
    assert text.behind("count")[:2] == ["0.20 → 0.70", "0.40 → 0.90"]
    assert text.behind("Step 3", "value", "reward")[0] == "1"
    step = text.behind("Step 3")
    assert step[step.index("kl") + 1] == "0.375"
    assert text.behind("model")[0] == "base" and text.behind("num_generations")[0] == "4"
    assert any("finished, 3 steps" in words for words in text.words)
    assert "No held-out" not in " ".join(text.words)


def test_where_the_rest_lies(tmp_path):
    run = write_run(tmp_path / "mine", [metrics_row(1)], [completion_row(1)])
    assert "curves.png" not in page_of(run).words
    (run / "curves.png").write_bytes(b"")
    words = page_of(run).words
    assert {str(run), "curves.png", "metrics.jsonl", "completions.jsonl"} <= set(words)
    assert any(words.startswith("There is no held-out accuracy") for words in words)


def test_several_runs_and_their_evaluations(tmp_path):
    scores = {"step-3": {"cvbench": {"total": 0.4321, "by_task": {}, "count": 2638}}}
    runs = [write_run(tmp_path / name, [metrics_row(1)], (), scores) for name in ("one", "two")]
    words = page_of(*runs).words
    assert words.count("43.21") == 2 and words.count("Settings") == 2
    assert any(word.endswith(" (paper)") for word in words)


def test_a_run_that_holds_nothing_yet(tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    (run / "config.yaml").write_text("{}\n")
    text = page_of(run)
    assert any("holds no more" in words for words in text.words)


@pytest.mark.parametrize(
    "text",
    [
        "</noscript><script>alert(1)</script><img src=x onerror=alert(2)>",
        "<!--<style>body{display:none}</style>-->",
        "$data ${script} $$ &amp; \"quoted\" 'single'",
        "\x1b[2J \u202e \0 \r\n",
    ],
)
def test_nothing_of_a_run_is_markup(text, tmp_path):
    page = write_report([hostile_run(tmp_path / "run", text)]).read_text("utf-8")
    assert page.count("</noscript>") == 1 and page.count("<script") == 2
    read = Text(page)
    assert read.tags <= OURS
    shown = read.behind("data")[0]
    steers = dict.fromkeys([0x1B, 0x202E, 0, 0x0D])
    assert shown == text.translate({one: ascii(chr(one))[1:-1] for one in steers})
