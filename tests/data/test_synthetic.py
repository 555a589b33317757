"""The rendered questions: schema, pictures, answers checked against the scene by other means."""

import io
import random
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vtfast.data import synthetic
from vtfast.data.synthetic import KINDS, question_key, sample_question, sample_questions, split_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return synthetic.write_dataset(tmp_path_factory.mktemp("data"), train=200, val=80, seed=3)


@pytest.fixture(scope="module")
def rows(dataset):
    return [row for path in dataset for row in pq.read_table(path).to_pylist()]


def drawn(number=400):
    rng = random.Random("test")
    return [sample_question(rng, kind=KINDS[i % 4]) for i in range(number)]


def test_files_have_the_raw_schema_of_sat(dataset):
    strings = pa.list_(pa.string())
    for path, number in zip(dataset, (200, 80), strict=True):
        schema = pq.read_schema(path)
        assert [(f.name, f.type) for f in schema] == [
            ("image_bytes", pa.list_(pa.binary())),
            ("question", pa.string()),
            ("answers", strings),
            ("question_type", pa.string()),
            ("correct_answer", pa.string()),
        ]
        assert pq.read_metadata(path).num_rows == number
    assert {p.name for p in dataset[0].parent.iterdir()} == {"train.parquet", "val.parquet"}


def test_rows_hold_one_jpeg_with_full_chroma(rows):
    for row in rows:
        (data,) = row["image_bytes"]
        assert data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9"
    image = Image.open(io.BytesIO(data))
    assert image.size == (84, 84) and image.mode == "RGB"
    assert len(image.layer) == 3 and all(layer[1:3] == (1, 1) for layer in image.layer)


def test_options_are_distinct_and_the_first_is_right(rows):
    for row in rows:
        options = row["answers"]
        assert len(set(options)) == len(options) == (5 if "How many" in row["question"] else 2)
        assert row["correct_answer"] == options[0]
        assert row["question_type"] == "other"
        assert all(int(o) >= 0 for o in options if o.isdigit())


def test_kinds_are_balanced_and_use_the_templates_of_sat(rows):
    thing = r"(?:red|green|blue|yellow) (?:circle|square|triangle)"
    templates = {
        "across": f"Considering the relative positions, is {thing} to the left or right of {thing}\\?",
        "upright": f"Considering the relative positions, is {thing} above or below {thing}\\?",
        "count": r"How many (?:circle|square|triangle)s are visible in the scene\?",
        "depth": f"Which object is closer to the camera taking this photo, {thing} or {thing}\\?",
        "distance": "Estimate the real-world distances between objects in this image. "
        f"Which object is closer to {thing}, {thing} or {thing}\\?",
    }
    found = dict.fromkeys(templates, 0)
    for row in rows:
        (name,) = [n for n, t in templates.items() if re.fullmatch(t, row["question"])]
        found[name] += 1
    assert found["across"] > 20 and found["upright"] > 20
    assert found["across"] + found["upright"] == found["count"] == found["depth"] == 70
    assert found["distance"] == 70


def test_the_seed_decides_everything(tmp_path, dataset):
    again = synthetic.write_dataset(tmp_path / "a", train=200, val=80, seed=3)
    other = synthetic.write_dataset(tmp_path / "b", train=200, val=80, seed=4)
    for one, same, different in zip(dataset, again, other, strict=True):
        assert pq.read_table(one).equals(pq.read_table(same))
        assert not pq.read_table(one).equals(pq.read_table(different))


def test_no_validation_question_or_scene_occurs_in_training():
    train = sample_questions(1500, split="train", seed=0)
    val = sample_questions(400, split="val", seed=1)
    assert len({question_key(q) for q in train}) == 1500
    assert not {question_key(q) for q in train} & {question_key(q) for q in val}
    assert not {q.scene.layout() for q in train} & {q.scene.layout() for q in val}
    assert {split_of(q.scene) for q in val} == {"val"}


def test_key_ignores_the_jitter_and_nothing_else():
    question = drawn(1)[0]
    scene = question.scene
    first, *rest = scene.things
    size = {"small": "large", "large": "small"}[first.size]
    moved = synthetic.Scene((replace(first, dx=first.dx + 1), *rest))
    grown = synthetic.Scene((replace(first, size=size), *rest))
    key = question_key(question)
    assert moved != scene and split_of(moved) == split_of(scene)
    assert question_key(replace(question, scene=moved)) == key
    assert question_key(replace(question, scene=grown)) != key
    assert question_key(replace(question, text=question.text + " ")) != key


# ------------------------------------------------------------------------------------------ answers


def objects(scene):
    """{colour: (x, y, width, pixels)} of the bounding boxes, from the picture alone."""
    pixels = np.asarray(synthetic.render(scene)).astype(int)
    found = {}
    for name, rgb in synthetic.COLOURS.items():
        ys, xs = np.nonzero((np.abs(pixels - rgb).max(-1)) == 0)
        if len(xs):
            found[name] = ((xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2, xs.max() - xs.min() + 1, len(xs))
    return found


def measured_answer(question):
    """The answer, from the picture and the question's words alone."""
    seen = objects(question.scene)
    named = re.findall(r"(red|green|blue|yellow) (circle|square|triangle)", question.text)
    if question.kind == "count":
        shape = re.search(r"How many (\w+)s ", question.text)[1]
        # What share of its bounding box an object fills tells its shape: 1, about 0.79, about 0.5.
        filled = [pixels / width**2 for _, _, width, pixels in seen.values()]
        names = ["square" if f > 0.95 else "circle" if f > 0.7 else "triangle" for f in filled]
        return str(names.count(shape))
    if question.kind == "relation":
        a, b = (seen[colour] for colour, _ in named)
        if "left" in question.text:
            return "left" if a[0] < b[0] else "right"
        return "above" if a[1] < b[1] else "below"
    if question.kind == "depth":
        return " ".join(max(named, key=lambda n: seen[n[0]][2]))
    x, y, *_ = seen[named[0][0]]
    return " ".join(min(named[1:], key=lambda n: np.hypot(seen[n[0]][0] - x, seen[n[0]][1] - y)))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_picture_shows(kind):
    questions = [q for q in drawn(800) if q.kind == kind]
    for question in questions:
        assert measured_answer(question) == question.answer, question
    assert len({q.answer for q in questions}) >= 4  # all of left/right/above/below, 1 to 4, ...


def test_objects_keep_to_their_cells_and_leave_the_marks_alone():
    empty = np.asarray(synthetic.render(synthetic.Scene(())))
    marks = (empty != synthetic.BACKGROUND).any(-1)
    for question in drawn(200):
        picture = np.asarray(synthetic.render(question.scene))
        assert (picture[marks] == empty[marks]).all()
        assert len(objects(question.scene)) == len(question.scene.things)


def test_traces_speak_of_the_scene_and_hasty_answers_are_often_wrong():
    for question in drawn():
        things = {t.colour: t for t in question.scene.things}
        for colour, word in re.findall(r"([a-z]+) ([a-z]+)", question.trace):
            thing = things[colour]
            facts = (synthetic.COLUMNS[thing.column], synthetic.ROWS[thing.row], thing.size)
            steps = abs(thing.row - 1) + abs(thing.column - 1)
            assert word in (*facts, {1: "one", 2: "two"}.get(steps)), question
        if question.kind == "count":
            shape = re.search(r"How many (\w+)s ", question.text)[1]
            numbered = re.findall(r"(\d) (\w+)", question.trace)
            assert [n for n, _ in numbered] == [str(i + 1) for i in range(len(numbered))]
            assert {c for _, c in numbered} == {t.colour for t in things.values() if t.shape == shape}
    wrong = {k: [q.hasty != q.answer for q in drawn() if q.kind == k] for k in KINDS}
    assert all(0.3 < sum(w) / len(w) < 0.7 for w in wrong.values()), wrong


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        synthetic.write_dataset(tmp_path, train=4, val=4)
    assert not list(tmp_path.iterdir())
