"""Reading questions: every schema, every way a row can be wrong."""

import io
import logging
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_files import (
    ROWS,
    assert_same_questions,
    encoded,
    picture,
    png_header,
    sat_row,
    write_sat,
    write_sat_v2,
    write_visualthinker,
)
from PIL import Image, ImageFile

import vtfast.data.images
from vtfast.data import InvalidRow, Sample, load_samples, parse_row, question_kind, shuffle_options
from vtfast.data.file_reader import RawRow
from vtfast.data.images import Images
from vtfast.utils.errors import UserError

# ---------------------------------------------------------------------------------- sources


def test_the_raw_schema(tmp_path):
    rows = [*ROWS, sat_row(4, image_bytes=[encoded(), encoded(picture(50, 60))])]
    path = write_sat(tmp_path / "SAT_train.parquet", rows)
    samples = load_samples(path)
    assert_same_questions(samples, rows)
    assert samples.skipped == []
    assert samples.source == str(path)
    assert [sample.row for sample in samples] == [0, 1, 2, 3, 4]
    assert samples[0].kind == "count"
    assert samples[0].source == str(path)


def test_sat_v2(tmp_path):
    assert_same_questions(load_samples(write_sat_v2(tmp_path / "x.parquet", ROWS)), ROWS)


@pytest.mark.parametrize("json_folder", [".", "SAT"])
def test_visualthinkers_json(tmp_path, json_folder):
    """Image paths start from the JSON's folder, or from the one above."""
    rows = [
        sat_row(0),
        sat_row(1, answers=["left", "right"], correct_answer="right"),
        sat_row(2, answers=["red", "black or white"], correct_answer="black or white"),
        sat_row(3, answers=["black or white", "red"], correct_answer="red"),
        sat_row(4, answers=["red", "black or white"], correct_answer="red"),
    ]
    path = tmp_path / json_folder / "SAT_train_15000.json"
    samples = load_samples(write_visualthinker(path, rows, tmp_path / "SAT_images_train"))
    assert_same_questions(samples, rows)
    assert_same_questions(load_samples(path.parent), rows)  # the folder, too


def test_options_are_left_in_order_until_shuffled(tmp_path):
    rows = [sat_row(n % 4, question=f"How many? {n}") for n in range(40)]
    samples = load_samples(write_sat(tmp_path / "x.parquet", [*rows, sat_row(answers=[])]))
    once, again, other = (shuffle_options(samples, seed) for seed in (0, 0, 1))
    assert [s.options for s in once] == [s.options for s in again]
    assert [s.options for s in once] != [s.options for s in other]
    assert all(sorted(s.options) == sorted(rows[0]["answers"]) for s in once)
    assert {s.options.index("3") for s in once} == {0, 1, 2, 3, 4}
    assert all(sample.options == rows[0]["answers"] for sample in samples)
    assert (once.skipped, once.source) == (samples.skipped, samples.source)
    later = type(samples)(samples[20:])  # a row's order does not hang on the rows before it
    assert [s.options for s in shuffle_options(later, 0)] == [s.options for s in once[20:]]


# ------------------------------------------------------------------------------------- rows

BAD = {
    "no image": {"image_bytes": []},
    "no image at all": {"image_bytes": None},
    "image 0: empty": {"image_bytes": [b""]},
    "image 0: not an image of any known format": {"image_bytes": [b"\xff\xd8 nonsense \xff\xd9"]},
    "image 0: corrupt image": {"image_bytes": [encoded(picture(200, 200))[:-200]]},
    "image 1: corrupt image": {"image_bytes": [encoded(), encoded(picture(200, 200), "PNG")[:-2000]]},
    "aspect ratio above 200": {"image_bytes": [encoded(picture(805, 4))]},
    "20000 x 80 pixels: aspect ratio above 200": {"image_bytes": [encoded(picture(20000, 80))]},
    "a side of one pixel": {"image_bytes": [encoded(picture(1, 1))]},
    "40 x 1 pixels: a side of one pixel": {"image_bytes": [encoded(picture(40, 1))]},
    "image of more than": {"image_bytes": [png_header(50_000, 50_000)]},
    "12000 x 9000 pixels, more than": {"image_bytes": [png_header(12_000, 9_000)]},
    "image 0: corrupt image (": {"image_bytes": [png_header(100, 100)]},
    "the answer '7' is not among the options": {"correct_answer": "7"},
    "the answer 'left' is not among": {"correct_answer": "left", "answers": ["Left", "right"]},
    "the question is empty": {"question": " \n"},
    "the question is None, not text": {"question": None},
    "the answer is None, not text": {"correct_answer": None},
    "the option is None, not text": {"answers": ["3", None]},
    "no options": {"answers": []},
    "no options at all": {"answers": None},
    "special token": {"question": "How many? <|image_pad|>"},
    "special token <|im_end|>": {"answers": ["3", "<|im_end|>"]},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows_are_skipped_with_their_number(tmp_path, reason, caplog):
    path = write_sat(tmp_path / "x.parquet", [ROWS[0], sat_row(1, **BAD[reason]), ROWS[2]])
    with caplog.at_level(logging.WARNING, "vtfast"):
        samples = load_samples(path)
    assert_same_questions(samples, [ROWS[0], ROWS[2]])
    assert [sample.row for sample in samples] == [0, 2]
    [(number, told)] = samples.skipped
    where = samples.where[number]
    assert (number, where) == (1, "x.parquet, row 1 (counted from 0)")
    assert samples[1].where == "x.parquet, row 2 (counted from 0)"
    assert reason.removesuffix(" at all") in told
    assert caplog.messages == [f"skipped 1 of 3 rows: {path}, row 1 (counted from 0): {told}"]
    with pytest.raises(UserError) as stopped:
        load_samples(path, on_bad="error")
    assert f"{path}, row 1 (counted from 0): {told}" in str(stopped.value)


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    """No pixel is decoded: 50,000 x 50,000 of them are 7.5 GB."""

    def load(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for sides in ((50_000, 50_000), (12_000, 9_000)):
        with pytest.raises(InvalidRow, match="more than"):
            parse_row(sat_row(image_bytes=[png_header(*sides)]))


def test_a_long_strip_within_the_ratio_is_an_image():
    sample = parse_row(sat_row(image_bytes=[encoded(picture(20_000, 200))]))
    assert sample.images[0].size == (20_000, 200)


def test_a_decompression_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(vtfast.data.images, "MAX_PIXELS", 1000)
    rows = [sat_row(0, image_bytes=[encoded(picture(20, 20))]), sat_row(1)]
    samples = load_samples(write_sat(tmp_path / "x.parquet", rows))
    assert samples.skipped[0] == (1, "image 0: image of 40 x 30 pixels, more than 1000")


def test_pils_own_bomb_alarm_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InvalidRow, match="image of more than"):
        parse_row(ROWS[0])


def test_rows_count_over_all_files(tmp_path, caplog):
    """And in messages over each file."""
    for number in range(3):
        rows = [sat_row(0), sat_row(1, answers=[])]
        write_sat(tmp_path / f"train-0000{number}-of-00003.parquet", rows)
    samples = load_samples(tmp_path)
    assert [row for row, _ in samples.skipped] == [1, 3, 5]
    assert [sample.row for sample in samples] == [0, 2, 4]
    assert all(
        f"train-0000{number}-of-00003.parquet, row 1 (counted from 0): no options" in caplog.text for number in range(3)
    )


def test_the_warning_stays_one_line(tmp_path, caplog):
    rows = [ROWS[0], *(sat_row(answers=[]) for _ in range(9))]
    samples = load_samples(write_sat(tmp_path / "x.parquet", rows))
    [message] = caplog.messages
    assert "skipped 9 of 10 rows" in message
    assert "row 3 (counted from 0): no options; and 6 more" in message
    assert len(samples.skipped) == 9


def test_the_generators_known_bug_is_undone(tmp_path):
    options = ["left in the first frame", "right"]
    row = sat_row(answers=options, correct_answer="left in the first frame")
    [sample] = load_samples(write_sat(tmp_path / "x.parquet", [row]))
    assert (sample.options, sample.answer) == (["left", "right"], "left")


def test_all_rows_bad(tmp_path):
    path = write_sat(tmp_path / "x.parquet", [sat_row(answers=[])] * 5)
    with pytest.raises(UserError, match=r"no usable row among 5.*row 0 \(counted from 0\): no options.*row 2 \("):
        load_samples(path)


IMAGE_ITEMS = [
    encoded(),
    bytearray(encoded()),
    memoryview(encoded()),
    {"bytes": encoded(), "path": None},
    {"bytes": encoded(), "path": "elsewhere.jpg"},
    picture(),
]


@pytest.mark.parametrize("item", IMAGE_ITEMS, ids=lambda item: type(item).__name__)
@pytest.mark.parametrize("column", ["image_bytes", "images"])
def test_every_form_of_an_image(item, column):
    row = {key: value for key, value in ROWS[0].items() if key != "image_bytes"}
    sample = parse_row(row | {column: [item]})
    assert [image.size for image in sample.images] == [(40, 30)]


def test_image_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(kind="PNG"))
    for item in ("a.png", {"bytes": None, "path": "a.png"}, str(tmp_path / "a.png")):
        assert parse_row(sat_row(image_bytes=[item]), folder=tmp_path).images[0].size == (40, 30)
    with pytest.raises(InvalidRow, match=r"image 0: no such file: .*b\.png"):
        parse_row(sat_row(image_bytes=["b.png"]), folder=tmp_path)
    with pytest.raises(InvalidRow, match="has no folder"):
        parse_row(sat_row(image_bytes=["a.png"]))


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "image_bytes": JSON_LIKE | st.just([encoded()]),
        "images": JSON_LIKE | st.just([{"bytes": encoded()[:300]}]),
        "question": JSON_LIKE | st.just("?"),
        "answers": JSON_LIKE | st.just(["a", "b"]),
        "correct_answer": JSON_LIKE | st.just("a"),
        "question_type": JSON_LIKE,
        "messages": JSON_LIKE
        | st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["user", "assistant"]),
                    "content": JSON_LIKE | st.just("? Choose between the following options: a"),
                }
            )
        ),
    },
)


@settings(max_examples=300, deadline=None)
@given(JSON_LIKE | ENTRIES)
def test_no_row_raises_anything_else(entry):
    try:
        sample = parse_row(RawRow(entry, "row 0").mapping())
    except UserError:
        return
    assert sample.question.strip() and sample.answer.strip()
    assert not sample.options or sample.answer in sample.options
    if "messages" in entry or "correct_answer" in entry:  # SAT's, which always have both
        assert sample.options and len(sample.images) > 0


# ----------------------------------------------------------------------------------- images


def test_images_are_decoded_on_every_access_and_kept_encoded():
    data = encoded(picture(512, 512))
    images = Images([data, picture()])
    assert images[0] is not images[0]
    assert images[0].tobytes() == Image.open(io.BytesIO(data)).tobytes()
    assert [image.size for image in images] == [(512, 512), (40, 30)]
    assert len(images[:1]) == 1
    assert images[-1].size == (40, 30)
    with pytest.raises(IndexError):
        images[2]
    assert len(pickle.dumps(Images([data]))) < len(data) + 200


def test_a_sample_from_its_four_names():
    sample = Sample(question="Is A left of B?", options=["yes"], answer="yes", images=[picture()])
    assert (sample.kind, sample.row) == ("relation", -1)


# ------------------------------------------------------------------------------------ kinds

KINDS = {
    "count": ["How many Chairs are visible in the scene?", "How many organs are in the image?"],
    "depth": [
        "Which point is closer to the camera taking this photo, point A  or point B?",
        "Which object is closer to the camera taking this photo, cup (marked A) or bed (marked B)?",
        "Is cup (marked A) behind bed (marked B)?",
        "Is cup in front of bed?",
        "Is cup further away or in front of bed?",
    ],
    "relation": [
        "Considering the relative positions, where is cup with respect to bed?",
        "Considering the relative positions, is cup to the left or right of bed?",
        "Considering the relative positions, is cup above or below bed?",
        "Is cup to the left of bed?",
        "Is cup to the right of bed?",
        "Considering the relative positions of the dog and the sheep in the image provided, where "
        "is the dog located with respect to the sheep? Select from the following choices.",
    ],
    "distance": [
        "Estimate the real-world distances between objects in this image. Which object is closer "
        "to the towel (highlighted by a red box), the sink (highlighted by a blue box) or the "
        "toilet (highlighted by a green box)?",
        "Which object is closer to the cup, bed or chair?",
    ],
    "other": ["What is this?"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_by_the_words_of_sat_and_cv_bench(kind):
    for question in KINDS[kind]:
        assert question_kind(question, "other") == kind
        assert question_kind(question) == question_kind(question, "") == kind
        assert question_kind(question, "obj_movement") == "obj_movement"
