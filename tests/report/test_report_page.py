"""The page as a file: safe, whole, self-contained; and the command that writes it."""

import base64
import hashlib
import json
import re

import pytest
from make_runs import completion_row, metrics_row, write_lines, write_run

from vtfast.cli.main import main
from vtfast.report import write_report
from vtfast.report.page import embed
from vtfast.utils.errors import UserError

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "--> ]]> <img src=x onerror=alert(1)>",
    "a\u2028b\u2029c",
    "$data ${script} $$ {{style}}",
    'quote " backslash \\ \\u003c nul \0 return \r\n',
    "😀 \ud800 \ufffe",
]


@pytest.fixture
def run(tmp_path):
    metrics = [metrics_row(step) for step in (1, 2, 3)]
    rows = [completion_row(1, text) for text in HOSTILE]
    return write_run(tmp_path / "run", metrics, rows)


def embedded(html: str) -> str:
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]


def test_nothing_embedded_can_end_its_element():
    text = embed(HOSTILE)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == [*HOSTILE[:-1], "😀 ? \ufffe"]
    with pytest.raises(ValueError, match="JSON compliant"):
        embed(float("nan"))


def test_the_page_holds_what_the_model_wrote_as_data(run):
    html = write_report([run]).read_text("utf-8")
    assert html.count("<script") == 2 and html.count("</script>") == 2 and "<!--" not in html
    rows = json.loads(embedded(html))["completions"]["rows"]
    assert [row["completion"] for row in rows] == [*HOSTILE[:-1], "😀 ? \ufffe"]


def test_the_page_asks_for_nothing_and_admits_its_own_script_alone(run):
    html = write_report([run]).read_text("utf-8")
    shell = html.replace(embedded(html), "")
    addresses = set(re.findall(r"[a-z]+://[^\"'\s]+", shell))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a namespace, not an address"
    assert not re.search(r"<link|\bsrc=|url\(|@import|innerHTML|insertAdjacent|document\.write", shell)
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', html)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_stays_small_however_many_runs(tmp_path):
    rows = [completion_row(step, "long " * 5000) for step in range(1, 401)]
    folders = [write_run(tmp_path / name, [metrics_row(1)], rows) for name in "ab"]
    assert all((folder / "completions.jsonl").stat().st_size > 10e6 for folder in folders)
    assert write_report(folders).stat().st_size < 10e6
    for folder in folders:
        write_lines(folder / "completions.jsonl", [completion_row(1)] * 1500)
    data = json.loads(embedded(write_report(folders).read_text("utf-8")))["completions"]
    assert data["total"] == 3000 and len(data["rows"]) == 2000


def test_a_page_that_cannot_be_written_leaves_the_old_one(run, tmp_path, monkeypatch):
    path = write_report([run], tmp_path / "page.html")
    old = path.read_bytes()

    def full(self, other):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report([run], path)
    assert path.read_bytes() == old
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["page.html", "run"]


def test_the_command(run, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    other = write_run(tmp_path / "other")
    page = tmp_path / "both.html"
    assert main(["report", str(other), str(run), "--output", str(page)]) == 0
    assert "other, run" in page.read_text() and not (other / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN"),
        (["{tmp}"], "neither config.yaml nor metrics.jsonl"),
        (["{tmp}/run", "{tmp}/gone"], "gone: no such folder"),
        (["{tmp}/run", "--output", "{tmp}/no/page.html"], "no/page.html"),
        (["{tmp}/run", "--output", "{tmp}"], "not a file"),
        (["{tmp}/run", "--ouput", "x"], "did you mean --output"),
    ],
)
def test_mistakes_cost_one_line(arguments, message, run, tmp_path, capsys):
    assert main(["report", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob("*.partial"))


def test_a_run_that_samples_nothing_misses_nothing(tmp_path):
    """Fine-tuning leaves a loss and no completions."""
    rows = [{"step": step, "loss": 2.0 - step / 10, "clip_ratio/low": 0.0} for step in (1, 2, 3)]
    folder = write_run(tmp_path / "sft", rows, num_generations=None)
    (folder / "completions.jsonl").unlink()
    data = json.loads(embedded(write_report([folder]).read_text("utf-8")))
    assert data["runs"][0]["notes"] == [] and data["completions"] == {"total": 0, "rows": []}
    assert [chart["title"] for chart in data["training"]] == ["Loss"]
    assert data["zero"] == ["Clipped tokens"] and data["time"] == []


def test_lengths_are_labelled_by_what_was_frozen_where_that_tells_runs_apart(tmp_path):
    rows, answers = [metrics_row(1)], [completion_row(1)]
    folders = [
        write_run(tmp_path / name, rows, answers, freeze=parts)
        for name, parts in (("a", []), ("b", ["vision"]), ("c", []))
    ]
    labels = []
    for chosen in (folders[:2], folders):
        page = write_report(chosen).read_text("utf-8")
        data = json.loads(embedded(page))
        labels.append([line["label"] for line in data["length"][0]["lines"]])
        assert [row["run"] for row in data["completions"]["rows"]] == list(range(len(chosen)))
    assert labels == [["nothing frozen", "vision encoder frozen"], ["a", "b", "c"]]
