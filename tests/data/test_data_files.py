"""Which files a source means, and every way a file or the hub can be wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_files import ROWS, assert_same_questions, encoded, sat_row, write_jsonl, write_sat, write_visualthinker
from PIL import Image

import vtfast.data.file_reader
from vtfast.data import AUTO_COLUMNS, load_samples
from vtfast.data.data_files import find_files
from vtfast.data.file_reader import read_rows
from vtfast.utils.errors import UserError

# ---------------------------------------------------------------------------------- folders


def test_a_folder_of_numbered_files(tmp_path):
    for number in range(11):  # 10 comes behind 9
        row = sat_row(number % 4, question=f"How many? {number}")
        write_sat(tmp_path / f"data/train-{number}-of-11.parquet", [row])
    write_sat(tmp_path / "data/validation-00000-of-00001.parquet", [sat_row(3)])
    samples = load_samples(tmp_path)
    assert [sample.question for sample in samples] == [f"How many? {n}" for n in range(11)]
    assert [sample.row for sample in samples] == list(range(11))
    assert_same_questions(load_samples(tmp_path, split="val"), [sat_row(3)])


def test_split_by_file_name(tmp_path):
    for seed, split in enumerate(("train", "static", "val", "test")):
        write_sat(tmp_path / f"SAT_{split}.parquet", [sat_row(seed)])
    assert_same_questions(load_samples(tmp_path), [sat_row(0)])
    assert_same_questions(load_samples(tmp_path, "static"), [sat_row(1)])
    assert_same_questions(load_samples(str(tmp_path), "validation"), [sat_row(2)])
    with pytest.raises(UserError, match=r"no split 'dev' \(there is: .*SAT_val.parquet"):
        load_samples(tmp_path, "dev")


def test_a_lone_file_without_a_split_in_its_name(tmp_path):
    path = write_sat(tmp_path / "questions.parquet", ROWS)
    assert len(load_samples(tmp_path)) == 4
    assert len(load_samples(path, split="val")) == 4  # a file is what it is
    with pytest.raises(UserError, match="no split 'train'"):
        load_samples(tmp_path, split="train")


def test_ambiguous_and_incomplete_folders(tmp_path):
    write_sat(tmp_path / "train-00000-of-00002.parquet", ROWS)
    with pytest.raises(UserError, match="1 of the 2 files"):
        load_samples(tmp_path)
    write_sat(tmp_path / "SAT_train.parquet", ROWS)
    with pytest.raises(UserError, match=r"several files .*SAT_train.parquet, train-00000"):
        load_samples(tmp_path)


# ------------------------------------------------------------------------------------ files


def test_wrong_columns(tmp_path):
    table = pa.table({"image": [b""], "question": ["?"], "answers": [["a"]]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError) as error:
        load_samples(tmp_path / "x.parquet")
    told = str(error.value)
    assert f"{tmp_path / 'x.parquet'}: columns answers, image, question, and none" in told
    assert "is the answer (--answer_column)" in told


def test_unreadable_files(tmp_path):
    whole = write_sat(tmp_path / "whole.parquet", ROWS).read_bytes()
    broken = {
        "empty.parquet": (b"", "not a readable parquet file"),
        "text.parquet": (b"hello world, this is no parquet", "not a readable parquet file"),
        "torn.parquet": (whole[: len(whole) // 2], "not a readable parquet file"),
        "dented.parquet": (b"PAR1" + b"\xff" * 3000 + whole[3004:], "dented.parquet"),
        "torn.json": (b'[{"messages": ', "not a readable json file"),
        "deep.json": (b"[" * 200_000, "not a readable json file"),
        "binary.json": (b"\xff\xfe\x00\xd8", "not a readable json file"),
        "object.json": (b"{}", "must be a JSON list of rows, not dict"),
        "other.json": (b'[{"question": "?"}]', "columns question, and none of them is the answer"),
        "none.json": (b"[]", "it has no rows"),
        "none.jsonl": (b"\n\n", "it has no rows"),
        "torn.jsonl": (b'{"question": "?", "ans', "torn.jsonl, line 1: not JSON \\(Unterminated string"),
        "list.jsonl": (b"[1]", "list.jsonl, line 1: must be a mapping of columns to values, not list"),
        "other.jsonl": (b'{"question": "?"}', "columns question, and none of them is the answer"),
        "x.csv": (b"question", "unknown kind of file"),
    }
    for name, (data, reason) in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=reason) as error:
            load_samples(tmp_path / name)
        assert name in str(error.value)


def test_nothing_there(tmp_path):
    write_sat(tmp_path / "x.parquet", [])
    with pytest.raises(UserError, match="it has no rows"):
        load_samples(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"no such file or folder: .*missing"):
        load_samples(tmp_path / "missing")
    with pytest.raises(UserError, match="no such file or folder: data/train"):
        load_samples("data/train.parquet")  # a mistyped path, not a hub id
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is: nothing"):
        load_samples(tmp_path / "empty")


def test_bad_arguments(tmp_path):
    path = write_sat(tmp_path / "x.parquet", ROWS)
    with pytest.raises(UserError, match="limit=0"):
        load_samples(path, limit=0)


def test_json_rows_of_the_wrong_shape(tmp_path):
    path = write_visualthinker(tmp_path / "x.json", ROWS[:1], tmp_path / "images")
    good = json.loads(path.read_text())[0]
    user, assistant = good["messages"]
    bad = [
        "text",
        {"images": good["images"]},
        good | {"messages": [user]},
        good | {"messages": [assistant | {"role": "user"}, assistant]},
        good | {"messages": [user, assistant | {"content": 3}]},
        good | {"messages": [user | {"content": None}, assistant]},
        good | {"images": []},
        good | {"images": ["images/none.png"]},
    ]
    path.write_text(json.dumps([*bad, good]))
    samples = load_samples(path)
    assert [sample.row for sample in samples] == [len(bad)]
    assert [row for row, _ in samples.skipped] == list(range(len(bad)))


def test_limit_counts_good_rows_and_stops_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(vtfast.data.file_reader, "BATCH_ROWS", 2)
    rows = [sat_row(n % 4, question=f"{n}?", answers=["3"] * (n != 1)) for n in range(40)]
    path = write_sat(tmp_path / "x.parquet", rows)
    read, real = [], vtfast.data.file_reader._parquet_batches

    def counting(*arguments):
        for batch in real(*arguments):
            read.extend(batch)
            yield batch

    monkeypatch.setattr(vtfast.data.file_reader, "_parquet_batches", counting)
    samples = load_samples(path, limit=3)
    assert [sample.row for sample in samples] == [0, 2, 3]
    assert samples.skipped == [(1, "no options")]
    assert len(read) == 4


def test_first_rows_counts_all_rows_and_stops_reading(tmp_path, monkeypatch):
    """VisualThinker's `--total_num`: what is unusable among the first rows is not made up for."""
    monkeypatch.setattr(vtfast.data.file_reader, "BATCH_ROWS", 2)
    rows = [sat_row(n % 4, question=f"{n}?", answers=["3"] * (n != 1)) for n in range(40)]
    path = write_sat(tmp_path / "x.parquet", rows)
    assert [sample.row for sample in load_samples(path, first_rows=3)] == [0, 2]
    assert [sample.row for sample in load_samples(path, first_rows=4)] == [0, 2, 3]
    assert [sample.row for sample in load_samples(path, limit=1, first_rows=4)] == [0]
    assert len(load_samples(path, first_rows=100)) == 39
    read, real = [], vtfast.data.file_reader._parquet_batches

    def counting(*arguments):
        for batch in real(*arguments):
            read.extend(batch)
            yield batch

    monkeypatch.setattr(vtfast.data.file_reader, "_parquet_batches", counting)
    load_samples(path, first_rows=3)
    assert len(read) == 4


def test_first_rows_runs_over_files(tmp_path):
    for number in range(3):
        write_sat(tmp_path / f"train-0000{number}-of-00003.parquet", ROWS[:2])
    assert [sample.row for sample in load_samples(tmp_path, first_rows=3)] == [0, 1, 2]


# -------------------------------------------------------------------------------------- jsonl

ASKED = [{"question": f"How many? {n}", "answer": str(n)} for n in range(150)]


def test_a_jsonl_file(tmp_path):
    samples = load_samples(write_jsonl(tmp_path / "mine.jsonl", ASKED))
    assert [(s.question, s.answer) for s in samples] == [tuple(row.values()) for row in ASKED]
    assert [sample.row for sample in samples] == list(range(150))


def test_a_line_that_is_no_json_is_one_bad_row(tmp_path, caplog):
    path = write_jsonl(tmp_path / "mine.jsonl", ASKED[:3])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\n" + b'{"question": \n' + b"\xff\xfe\n" + lines[2].rstrip())
    samples = load_samples(path)
    assert [sample.question for sample in samples] == ["How many? 0", "How many? 2"]
    assert [row for row, _ in samples.skipped] == [1, 2]
    assert f"{path}, line 3: not JSON (Expecting value, column 13)" in caplog.text
    assert (
        f"{path}, line 4: not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"
        in caplog.text
    )
    assert samples.where == {1: "mine.jsonl, line 3", 2: "mine.jsonl, line 4"}
    assert samples[1].where == "mine.jsonl, line 5"
    with pytest.raises(UserError, match=r"mine\.jsonl, line 3: not JSON"):
        load_samples(path, on_bad="error")


def test_a_separator_inside_a_json_text_ends_no_line(tmp_path):
    row = {"question": "one\u2028two\x85three", "answer": "1"}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [sample.question for sample in load_samples(path)] == [row["question"]]


def test_a_folder_of_jsonl_files(tmp_path):
    for number in range(2):
        name = f"train-0000{number}-of-00002.jsonl"
        write_jsonl(tmp_path / name, ASKED[number : number + 1])
    write_jsonl(tmp_path / "test.jsonl", ASKED[2:3])
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [sample.answer for sample in load_samples(tmp_path)] == ["0", "1"]
    assert [sample.answer for sample in load_samples(tmp_path, "test")] == ["2"]


def test_an_incomplete_folder_of_jsonl_files(tmp_path):
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", ASKED)
    with pytest.raises(UserError, match="1 of the 2 files"):
        load_samples(tmp_path)


def test_a_json_list_of_plain_rows(tmp_path):
    """The one JSON file of a folder is its data, whatever it is called and whatever lies beside it."""
    (tmp_path / "rows_train.json").write_text(json.dumps(ASKED))
    (tmp_path / "README.md").write_text("mine")
    assert len(load_samples(tmp_path)) == len(load_samples(tmp_path, "val")) == 150


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    table = pa.table({"problem": ["?"], "solution": ["1"], "heavy": [b"x"], "question_type": ["a"]})
    pq.write_table(table, tmp_path / "x.parquet")
    [file] = find_files(str(tmp_path / "x.parquet"), None, stream=False)
    [[entry]] = read_rows(file, AUTO_COLUMNS.select)
    assert entry.value == {"problem": "?", "solution": "1", "question_type": "a"}


MEMORY = """
import re, sys
from pathlib import Path
from vtfast.data import AUTO_COLUMNS, load_samples
def peak():  # not ru_maxrss: a child starts with its parent's
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) / 1024
load_samples(sys.argv[1], limit=1)
before = peak()
load_samples(sys.argv[2], limit=20)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_one_huge_row_group_is_streamed(tmp_path):
    """SAT_train.parquet is one row group of 5 GB; here one of 400 MB must not come in whole."""
    noise = Image.effect_noise((600, 600), 90).convert("RGB")
    image = encoded(noise, quality=95)
    rows = [sat_row(image_bytes=[image])] * (400_000_000 // len(image))
    options = {"row_group_size": len(rows), "use_dictionary": False, "compression": "none"}
    huge = write_sat(tmp_path / "huge.parquet", rows, write_batch_size=16, **options)
    assert pq.ParquetFile(huge).num_row_groups == 1
    assert huge.stat().st_size > 300_000_000
    small = write_sat(tmp_path / "small.parquet", rows[:1])
    run = subprocess.run([sys.executable, "-c", MEMORY, small, huge], check=True, capture_output=True, text=True)
    assert float(run.stdout) < 200  # MB


# -------------------------------------------------------------------------------------- hub


def test_a_connection_that_fails_without_a_word(monkeypatch, tmp_path):
    """As a timeout may: its text is empty."""
    import huggingface_hub

    def mute(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", mute)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mute)
    with pytest.raises(UserError, match="no connection \\(TimeoutError: TimeoutError\\)"):
        load_samples("nobody/no-such-set")


def test_no_connection(monkeypatch, tmp_path):
    """Nothing listens on that port; the answer comes at once and not after the client's retries."""
    code = "from vtfast.data import load_samples; load_samples('array/SAT')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    message = run.stderr.strip().splitlines()[-1]
    assert "UserError: array/SAT is no local path" in message
    assert "no connection" in message
    assert "hf download array/SAT --repo-type dataset --local-dir FOLDER" in message


class FakeHub:
    """The three calls of huggingface_hub that are used, over a local folder."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.streamed, self.downloaded = folder, [], []
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub, "HfApi", lambda: self)
        monkeypatch.setattr(hub, "HfFileSystem", lambda: self)
        monkeypatch.setattr(hub, "hf_hub_download", self.download)
        monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: None)

    def repo_info(self, repo, repo_type, timeout):
        assert repo_type == "dataset"
        names = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.*"))
        siblings = [type("File", (), {"rfilename": name}) for name in names]
        return type("Info", (), {"siblings": siblings, "sha": "abc"})

    def open(self, path, mode):
        head, name = path.split("@abc/")
        assert head.startswith("datasets/")
        self.streamed.append(name)
        return (self.folder / name).open(mode)

    def download(self, repo, name, repo_type, revision):
        assert (repo_type, revision) == ("dataset", "abc")
        self.downloaded.append(name)
        return str(self.folder / name)


def test_a_hub_id(tmp_path, monkeypatch):
    write_sat(tmp_path / "SAT_train.parquet", ROWS)
    write_sat(tmp_path / "SAT_val.parquet", ROWS[:1])
    (tmp_path / "README.md").write_text("SAT")
    hub = FakeHub(tmp_path, monkeypatch)
    samples = load_samples("array/SAT", limit=2)
    assert_same_questions(samples, ROWS[:2])
    assert samples[0].source == "array/SAT/SAT_train.parquet"
    assert (hub.streamed, hub.downloaded) == (["SAT_train.parquet"], [])
    assert_same_questions(load_samples("array/SAT"), ROWS)
    assert hub.downloaded == ["SAT_train.parquet"]
    with pytest.raises(UserError, match="array/SAT: no split 'tset'"):
        load_samples("array/SAT", "tset")


def test_a_hub_id_of_jsonl(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", ASKED)
    hub = FakeHub(tmp_path, monkeypatch)
    assert [s.answer for s in load_samples("someone/questions", limit=2)] == ["0", "1"]
    assert [s.answer for s in load_samples("someone/questions", first_rows=2)] == ["0", "1"]
    assert (hub.streamed, hub.downloaded) == (["train.jsonl", "train.jsonl"], [])
    write_jsonl(tmp_path / "train.jsonl", [ASKED[0] | {"image": "a.png"}])
    with pytest.raises(UserError, match=r"a\.png is a path, and the data set has no folder"):
        load_samples("someone/questions")


def test_a_downloaded_copy_serves_without_connection(tmp_path, monkeypatch):
    import huggingface_hub

    class Offline:
        def repo_info(self, *_, **__):
            raise ConnectionError("no route")

    write_sat(tmp_path / "SAT_train.parquet", ROWS)
    monkeypatch.setattr(huggingface_hub, "HfApi", Offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    assert_same_questions(load_samples("array/SAT"), ROWS)


def test_an_unknown_hub_id(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    class Hub:
        def repo_info(self, *_, **__):
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(UserError, match=r"array/SATT .*no such id, or a private one"):
        load_samples("array/SATT")
