"""Finding a benchmark's files and images: every layout, and everything that may be missing or broken."""

import http.server
import threading
from pathlib import Path

import pytest
from make_benchmarks import (
    BLINK,
    CVBENCH,
    blink_row,
    cvbench_row,
    image,
    vsr_row,
    write_blink,
    write_cvbench,
    write_parquet,
    write_vsr,
)
from make_files import encoded, sat_row, write_sat, write_sat_v2

from vtfast.evaluate import BENCHMARKS, vsr_images
from vtfast.evaluate.benchmark_files import load_examples
from vtfast.evaluate.benchmarks.vsr import QUESTION
from vtfast.utils.errors import UserError


def items(bench: str, source: Path) -> list:
    return list(load_examples(BENCHMARKS[bench], source))


# ------------------------------------------------------------------------------------ layouts


def test_cvbench(tmp_path):
    rows = [cvbench_row(0), cvbench_row(1, "Relation"), cvbench_row(2, "Depth"), cvbench_row(3, "Distance")]
    folder = write_cvbench(tmp_path / "two", rows)
    (folder / "img").mkdir()
    (folder / "img" / "test_9d.parquet").write_text("not ours")
    found = items("cvbench", folder)
    assert [example.index for example in found] == [0, 1, 2, 3]
    assert [example.task for example in found] == ["Count", "Relation", "Depth", "Distance"]
    assert found[0].question == (
        "How many organs are in the image? Select from the following choices.\n(A) 3\n(B) 2\n(C) 1\n(D) 0"
    )
    assert found[0].options == ("3", "2", "1", "0") and found[0].gold == 1 and found[1].gold == 0
    assert found[3].where == f"{folder / 'test_3d.parquet'}, row 1 (counted from 0)"
    assert found[2].images == (rows[2]["image"]["bytes"],)
    one = write_parquet(tmp_path / "one" / "test-00000-of-00001.parquet", rows, CVBENCH)
    assert items("cvbench", one) == items("cvbench", one.parent) == found
    assert [example.task for example in items("cvbench", folder / "test_3d.parquet")] == ["Depth", "Distance"]


def test_blink(tmp_path):
    two_images = blink_row(5, "Relative_Depth", image_2=image(9))
    rows = [blink_row(0), blink_row(1, "Relative_Depth"), two_images, blink_row(3, "Relative_Depth")]
    folder = write_blink(tmp_path / "BLINK", rows)
    write_parquet(folder / "Counting" / "val-00000-of-00001.parquet", rows, BLINK)
    write_parquet(folder / "Relative_Depth" / "test-00000-of-00001.parquet", rows, BLINK)
    found = items("blink", folder)
    assert [(example.index, example.task) for example in found] == [
        (0, "Relative_Depth"),
        (2, "Relative_Depth"),
        (3, "Spatial_Relation"),
    ]
    assert found[0].question == (
        "Which point is closer to the camera?\nSelect from the following choices.\n(A) A is closer\n(B) B is closer"
    )
    assert len(items("blink", folder / "Spatial_Relation")) == 1


def test_sat(tmp_path):
    rows = [sat_row(number) for number in range(12)]
    path = write_sat(tmp_path / "sat" / "SAT_test.parquet", rows)
    write_sat(tmp_path / "sat" / "SAT_val.parquet", rows[:1])
    found = items("sat", path.parent)
    assert [example.options[example.gold] for example in found] == ["3"] * 12
    assert len({example.options for example in found}) > 3, "the right option must not always come first"
    assert found == items("sat", path)
    options = found[0].options
    assert found[0].question == (
        " Answer in natural language. How many Chairs are visible in the scene? (0) Choose between the following"
        f" options: {', '.join(options[:-1])} or {options[-1]}"
    )
    write_sat_v2(tmp_path / "v2" / "data" / "test-00000-of-00001.parquet", rows)
    assert items("sat", tmp_path / "v2") == found


def test_vsr(tmp_path):
    found = items("vsr", write_vsr(tmp_path / "vsr", [vsr_row(0), vsr_row(1)]))
    assert [example.gold for example in found] == [1, 0] and found[0].options == ("True", "False")
    assert found[0].question == (
        'Please analyze the provided image. Does the statement "The cup is left of the plate." accurately describes'
        " what you see? Choose from (A) True or (B) False."
    )
    assert found[0].images == (tmp_path / "vsr" / "000000000000.jpg",)
    assert QUESTION.count("{") == 1
    braces = vsr_row(0, caption="The {cup} is {0} here.")
    assert '"The {cup} is {0} here."' in items("vsr", write_vsr(tmp_path / "b", [braces]))[0].question


# ------------------------------------------------------------------------------------- errors


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"no such file or folder: .*nowhere.*--data blink=PATH"):
        items("blink", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nobody/CV-Bench is no local path.*--data cvbench=PATH"):
        items("cvbench", "nobody/CV-Bench")
    (tmp_path / "readme.md").write_text("")
    with pytest.raises(UserError, match=r"no files of BLINK \(there is: readme.md\)"):
        items("blink", tmp_path)
    with pytest.raises(UserError, match=r"readme.md: unknown kind of file"):
        items("blink", tmp_path / "readme.md")
    write_parquet(tmp_path / "cut" / "test-00000-of-00002.parquet", [cvbench_row()], CVBENCH)
    with pytest.raises(UserError, match="1 of the 2 files"):
        items("cvbench", tmp_path / "cut")


def test_what_is_broken_is_named(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"test.parquet: not a readable parquet file"):
        items("cvbench", tmp_path)
    path = write_blink(tmp_path / "blink", [blink_row(0)]) / "Spatial_Relation" / "val-00000-of-00001.parquet"
    with pytest.raises(UserError, match=r"val-00000-of-00001.parquet: no column task, source, image \(there is: idx"):
        items("cvbench", path)
    bad = [cvbench_row(0), cvbench_row(1, answer="hidden")]
    with pytest.raises(UserError, match=r"bad.parquet, row 1 \(counted from 0\): answer is 'hidden'"):
        items("cvbench", write_parquet(tmp_path / "bad.parquet", bad, CVBENCH))
    bare = [cvbench_row(0, image=None)]
    with pytest.raises(UserError, match=r"bare.parquet, row 0 \(counted from 0\): it has no image"):
        items("cvbench", write_parquet(tmp_path / "bare.parquet", bare, CVBENCH))
    (tmp_path / "test.jsonl").write_text('{"image": "a.jpg"')
    with pytest.raises(UserError, match=r"test.jsonl, line 1: not JSON"):
        items("vsr", tmp_path / "test.jsonl")
    (tmp_path / "test.jsonl").write_text('{"image": "a.jpg"}\n')
    with pytest.raises(UserError, match=r"test.jsonl: no column caption, label, relation"):
        items("vsr", tmp_path / "test.jsonl")
    (tmp_path / "test.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"line 1: must be a mapping of columns to values, not list"):
        items("vsr", tmp_path / "test.jsonl")


# -------------------------------------------------------------------------------- VSR's images


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vsr_images, "PAUSE", 0.01)
    return tmp_path / "cache" / "vtfast" / "vsr"


def test_where_images_are_looked_for(tmp_path, cache):
    rows = [vsr_row(0), vsr_row(1)]
    for place in (tmp_path / "vsr", tmp_path / "vsr" / "images", tmp_path / "coco", cache):
        folder = write_vsr(tmp_path / "vsr", rows, place)
        located = vsr_images.locate(items("vsr", folder), tmp_path / "coco")
        assert [example.images[0] for example in located] == [place / row["image"] for row in rows]
        for row in rows:
            (place / row["image"]).unlink()
    write_vsr(tmp_path / "vsr", rows, tmp_path / "coco")
    (tmp_path / "coco" / rows[1]["image"]).unlink()
    with pytest.raises(UserError, match=r"1 of 2 images are missing, 000000000001.jpg first .*--image_folder"):
        vsr_images.locate(items("vsr", tmp_path / "vsr"), tmp_path / "coco")


@pytest.fixture
def server():
    """Serves one picture under every name: fails twice before the first answer, 404 for names with "gone", and
    something that is no image for "text"."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status = 404 if "gone" in self.path else 503 if asked.count(self.path) < 3 else 200
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"words" if "text" in self.path else encoded())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_images_are_fetched_with_patience(tmp_path, cache, server, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    address, asked = server
    rows = [vsr_row(n, image_link=f"{address}/{n}.jpg") for n in range(3)]
    folder = write_vsr(tmp_path / "vsr", rows)
    for row in rows[:2]:
        (folder / row["image"]).unlink()
    wanted = items("vsr", folder)
    vsr_images.fetch(wanted, None)
    assert sorted(asked) == ["/0.jpg"] * 3 + ["/1.jpg"] * 3, "twice in vain, then the image; the third is there"
    assert sorted(path.name for path in cache.iterdir()) == [row["image"] for row in rows[:2]]
    assert [example.images[0].parent for example in vsr_images.locate(wanted, None)] == [cache, cache, folder]
    vsr_images.fetch(wanted, None)
    assert len(asked) == 6, "what is there is not asked for again"


@pytest.mark.parametrize(("path", "reason"), [("gone.jpg", "404"), ("text.jpg", "not an image"), (None, "no link")])
def test_images_that_cannot_be_had(tmp_path, cache, server, monkeypatch, path, reason):
    monkeypatch.setenv("no_proxy", "*")
    address, asked = server
    links = [f"{address}/0.jpg", f"{address}/{path}" if path else None]
    folder = write_vsr(tmp_path / "vsr", [vsr_row(n, image_link=link) for n, link in enumerate(links)])
    for image_file in folder.glob("*.jpg"):
        image_file.unlink()
    with pytest.raises(UserError, match=rf"1 of 2 images could not be fetched into .*{reason}"):
        vsr_images.fetch(items("vsr", folder), tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["000000000000.jpg"]
    assert asked.count(f"/{path}") == (vsr_images.TRIES if path else 0)
