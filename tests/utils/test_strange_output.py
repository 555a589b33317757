"""What is written and shown: through no link out of the run, steering no terminal, adding nothing to a page."""

import json
import logging
import re
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from make_benchmarks import cvbench_row, vsr_row, write_cvbench
from make_files import write_jsonl
from make_runs import file_name, hostile_run, metrics_row, write_run

from vtfast.cli.main import main
from vtfast.report import write_report
from vtfast.utils.errors import UserError
from vtfast.utils.files import write_atomically
from vtfast.utils.terminal import Formatter, message, printable

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\x00"
"""Orders to a terminal: title, clear, colour, right to left."""


@pytest.fixture
def evaluated(tmp_path, base_path):
    """A run of another person with an answered benchmark."""
    run = write_run(tmp_path / "run")
    shutil.copytree(base_path, run / "checkpoints" / "step-1")
    (run / "evaluations" / "step-1").mkdir(parents=True)
    return run


def evaluate(run: Path, *more: str) -> int:
    cvbench = write_cvbench(run.parent / "cvbench", [cvbench_row(0), cvbench_row(1, "Depth")])
    return main(["eval", "--model", str(run), "--data", f"cvbench={cvbench}", "--max_completion_length", "2", *more])


@pytest.mark.parametrize("link", ["evaluations", "evaluations/step-1", "evaluations/step-1/cvbench.jsonl"])
def test_an_evaluation_writes_through_no_link_out_of_the_run(evaluated, link, capsys):
    """Else the file that a link names would be cut off where its first line is no answer."""
    elsewhere = evaluated.parent / "mine"
    place = evaluated / link
    if place.is_dir():
        shutil.rmtree(place)
        elsewhere.mkdir()
    else:
        elsewhere.write_text("a secret without a line feed")
    place.symlink_to(elsewhere)
    assert evaluate(evaluated) == 2
    assert "outside of" in capsys.readouterr().err
    assert not list(elsewhere.iterdir()) if elsewhere.is_dir() else "secret" in elsewhere.read_text()


@pytest.mark.parametrize("name", ["settings.json", "scores.json"])
def test_a_link_in_place_of_a_result_is_replaced(evaluated, name):
    elsewhere = evaluated.parent / "mine.json"
    elsewhere.write_text("{}")
    (evaluated / "evaluations" / "step-1" / name).symlink_to(elsewhere)
    assert evaluate(evaluated) == 0
    assert elsewhere.read_text() == "{}"
    assert "cvbench" in json.loads((evaluated / "evaluations" / "step-1" / name).read_text())


def test_a_report_replaces_a_link(tmp_path):
    run = write_run(tmp_path / "run", [metrics_row(1)])
    (tmp_path / "mine").write_text("mine")
    (run / "report.html").symlink_to(tmp_path / "mine")
    write_report([run])
    assert (tmp_path / "mine").read_text() == "mine" and not (run / "report.html").is_symlink()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "x", "after \ud800")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "before")]


def test_a_link_where_it_is_written_first_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".x.guessed.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "x", "theirs")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_runs_settings_import_nothing_and_name_no_data(evaluated, tmp_path, monkeypatch):
    (tmp_path / "evil_reward.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"reward_funcs": ["evil_reward:f"], "data": "/dev/zero", "template": "r1-zero", "max_pixels": 3136}
    (evaluated / "config.yaml").write_text(yaml.safe_dump(config))
    assert evaluate(evaluated) == 0 and main(["report", str(evaluated)]) == 0
    assert not (tmp_path / "proof").exists() and "evil_reward" not in sys.modules


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"template": "/dev/zero"}, "not a regular file"),
        ({"template": ["r1-zero"]}, "wrong type of template"),
        ({"max_pixels": "many"}, "wrong type of max_pixels"),
        ({"min_pixels": 10**12, "max_pixels": 10**13}, "min_pixels 1000000000000 and max_pixels"),
    ],
)
def test_a_runs_settings_are_checked_like_others(evaluated, settings, reason, capsys):
    (evaluated / "config.yaml").write_text(yaml.safe_dump(settings))
    assert evaluate(evaluated) == 2
    assert re.search(reason, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["..", "x/y.jpg", "../x.jpg", "a" * 300])
def test_an_image_that_is_fetched_has_a_plain_name(name, tmp_path):
    from vtfast.evaluate.benchmarks.vsr import read

    with pytest.raises(UserError, match="expected a file name"):
        read(vsr_row(0, image=name), 0)


def test_a_cached_base_needs_no_network(tmp_path, monkeypatch, capsys):
    """A whole run, its evaluation and its report, with every connection refused."""
    asked = []

    def refuse(self, address, *_):
        asked.append(address)
        raise OSError("no network here")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *names, **_: refuse(None, names))
    run = tmp_path / "run"
    flags = {"max_steps": 1, "eval_samples": 4, "num_generations": 2, "max_completion_length": 8}
    flags |= {"report_to": "none", "per_device_train_batch_size": 2, "output_dir": run}
    assert main(["train", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    assert evaluate(run) == 0 and main(["report", str(run)]) == 0
    assert asked == []


def test_steering_characters_are_shown_and_not_obeyed():
    assert printable("a\tb\n\x1b[2J\x9b\u202e\ud800é😀") == "a\tb\n\\x1b[2J\\x9b\\u202e\\ud800é😀"
    assert message("two\nlines\x07") == "two lines\\x07"
    assert len(message("x" * 10**6)) < 4100 and message("x" * 10**6 + "end").endswith("end")
    record = logging.makeLogRecord({"msg": "%s", "args": (ESCAPES,)})
    assert "\x1b" not in Formatter("%(message)s").format(record)


def test_what_data_say_does_not_steer_the_terminal(tmp_path, capfd):
    """Bad rows, kinds of questions, file names and settings, in every command that prints some."""
    rows = [
        {"question": f"Where{ESCAPES}?", "answer": "x", "question_type": ESCAPES},
        {"question": "Where?", "answer": f"z{ESCAPES}", "options": ["a", ESCAPES]},
        {"question": "Where?", "answer": "x", "image": f"{ESCAPES}.png"},
    ]
    name = ESCAPES.rstrip("\0") + ".jsonl"
    file = str(write_jsonl(tmp_path / name, rows))
    for command in (
        ["data", "inspect", file],
        ["data", "inspect", file, "--json"],
        ["train", "--data", file, "--on_bad_sample", "error"],
        ["train", "--data", f"{tmp_path}/gone/{name}"],
        ["train", "--template", name],
        ["report", file],
    ):
        assert main(command) in (0, 2)
        text = "".join(capfd.readouterr())
        assert not set("\x1b\x07\x9b\u202e\0") & set(text), command
        assert "\\x1b" in text or "\\u001b" in text, command


def test_the_log_of_a_command_does_not_steer_the_terminal():
    code = "from vtfast.cli.main import _prepare, logging; _prepare(); logging.getLogger('vtfast').warning('\x1b[2J')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.stderr == b"\\x1b[2J\n"


MARKUP = (
    "</script><script>owned()</script ></script/><!--<script >owned()"
    "<img src=x onerror=owned()> <!-- ]]> --> \u2028\u2029 ' \" ` ${owned()} &lt; "
    "javascript:owned() </title></style><svg/onload=owned()> \x00\x1b[2J"
)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text that it holds as data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.data, self.reading = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, attributes))
        self.reading = ("id", "data") in attributes

    def handle_data(self, data):
        if self.reading:
            self.data += data

    def handle_endtag(self, tag):
        self.reading = False


def test_a_page_has_the_same_elements_whatever_is_in_it(tmp_path):
    hostile = hostile_run(tmp_path / file_name(MARKUP), MARKUP)
    pages = [write_report([run]).read_text() for run in (hostile, hostile_run(tmp_path / "tame", "tame"))]
    found, tame = map(Elements, pages)
    assert found.found == tame.found
    assert [tag for tag, _ in found.found].count("script") == 2
    assert not set("<>&\u2028\u2029") & set(found.data)  # a browser ends a script at `</script ` already
    assert json.loads(found.data)["completions"]["rows"][0]["completion"] == MARKUP
    assert MARKUP in [row["label"] for row in json.loads(found.data)["settings"][0]["rows"]]
    policy = next(dict(attributes) for tag, attributes in found.found if tag == "meta" and len(attributes) == 2)
    assert policy["content"].startswith("default-src 'none'; style-src 'sha256-")
