"""Other people's sets: which columns are taken for what, and rows with several images, one, or none."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_files import R1_V, encoded, picture, sat_row, write_jsonl, write_sat

from vtfast.data import FilteredOut, InvalidRow, RowFilter, load_samples, parse_row
from vtfast.data.columns import Columns
from vtfast.utils.errors import UserError

PNG = encoded(kind="PNG")

# Columns as the sets have them -> what is to be read. Sources: the cards of the sets; for Geo170K, gen_dataset.py of
# R1-Multimodal-Journey.
PUBLISHED = {
    "R1-V": (
        {"image": {"bytes": PNG}, "problem": "How many items?", "solution": "<answer> 3 </answer>"},
        ("How many items?", [], "3", 1),
    ),
    "multimodal-open-r1-8k-verified": (
        {
            "image": {"bytes": PNG},
            "problem": "Find x.\nA. 1\nB. 2",
            "solution": "<think>x is 2, so not\n<answer>A</answer> but</think>\n\n<answer>B</answer>",
            "original_question": "<image>Find x.",
            "original_answer": "Answer: B",
        },
        ("Find x.\nA. 1\nB. 2", [], "B", 1),
    ),
    "Geo170K": (
        {"image": {"bytes": PNG}, "question": "Find ∠A.", "answer": "∠A is 40.\nAnswer: B"},
        ("Find ∠A.", [], "B", 1),
    ),
    "MATH": (
        {"problem": "1/2 + 1/4?", "solution": "So \\boxed{\\frac{3}{4}}.", "answer": "\\frac{3}{4}"},
        ("1/2 + 1/4?", [], "\\frac{3}{4}", 0),
    ),
    "choices": (
        {"question": "?", "choices": ["a", "b"], "answer": "b", "images": [PNG, PNG]},
        ("?", ["a", "b"], "b", 2),
    ),
    "answers of several people are no options": (
        {"question": "?", "answers": ["a", "a", "b"], "answer": "a"},
        ("?", [], "a", 0),
    ),
    "marks of where images go": ({"question": "<image>\n<image> Which?", "answer": "left"}, ("Which?", [], "left", 0)),
    "an empty list of options": ({"question": "?", "answer": "a", "options": []}, ("?", [], "a", 0)),
    "no letter behind a colon": ({"question": "?", "answer": "Answer: Bricks"}, ("?", [], "Answer: Bricks", 0)),
    "a number": ({"question": "1 + 1?", "answer": 2}, ("1 + 1?", [], "2", 0)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_columns(name):
    row, (question, options, answer, images) = PUBLISHED[name]
    sample = parse_row(row)
    assert (sample.question, sample.options, sample.answer) == (question, options, answer)
    assert len(sample.images) == images


def test_sats_rows_are_whole_or_broken_and_others_are_open():
    """`correct_answer` tells a row of SAT, unless a flag says that it is somebody else's column."""
    row = {"question": "1 + 1?", "correct_answer": "2"}
    with pytest.raises(InvalidRow, match="no image"):
        parse_row(row)
    with pytest.raises(InvalidRow, match="no options"):
        parse_row(row | {"images": [PNG]})
    assert parse_row(row, columns=Columns(answer="correct_answer")).answer == "2"


def test_r1_vs_parquet(tmp_path):
    rows = [
        {"image": {"bytes": PNG, "path": None}, "problem": "How many?", "solution": "<answer>3</answer>"},
        {"image": None, "problem": "2 + 2?", "solution": "<answer>4</answer>"},
    ]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, R1_V), tmp_path / "data" / "train-00000-of-00001.parquet")
    samples = load_samples(tmp_path)
    assert [(s.answer, len(s.images)) for s in samples] == [("3", 1), ("4", 0)]
    assert samples[0].images[0].size == (40, 30)


def test_columns_of_ones_own(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(encoded(picture(60, 50), "PNG"))
    row = {"q": "Same?", "gold": "yes", "pick": ["yes", "no"], "question": "-", "answer": "-"}
    rows = [row | {"img": "a.png"}, row | {"img": ["a.png", "b.png"]}, row | {"img": None}, row, row | {"pick": None}]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    samples = load_samples(path, columns=Columns("q", "gold", "pick", "img"))
    assert {sample.question for sample in samples} == {"Same?"}
    assert {sample.answer for sample in samples} == {"yes"}
    assert [[image.size for image in sample.images] for sample in samples] == [
        [(40, 30)],
        [(40, 30), (60, 50)],
        [],
        [],
        [],
    ]
    assert [sample.options for sample in samples] == [["yes", "no"]] * 4 + [[]]


def test_the_unsaid_columns_are_still_recognised():
    row = {"prompt": "Same?", "answer": "yes", "image": PNG, "choices": ["yes", "no"]}
    sample = parse_row(row, columns=Columns(question="prompt"))
    assert (sample.question, sample.options, len(sample.images)) == ("Same?", ["yes", "no"], 1)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(question="qestion"), "no column 'qestion', which --question_column names"),
        (Columns(answer="x"), "no column 'x', which --answer_column names"),
        (Columns(options="x"), "no column 'x', which --options_column names"),
        (Columns(image="img"), r"no column 'img', which --image_column names \(there is: answer, q\)"),
        (Columns(), r"none of them is the question \(--question_column\)"),
    ],
)
def test_a_column_that_is_not_there(tmp_path, kind, columns, message):
    path = tmp_path / f"mine.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [{"q": "?", "answer": "1"}])
    else:
        pq.write_table(pa.table({"q": ["?"], "answer": ["1"]}), path)
    with pytest.raises(UserError, match=rf"mine\.{kind}: .*{message}"):
        load_samples(path, columns=columns)


def test_parquet_reads_only_what_is_needed(tmp_path):
    table = pa.table({"question": ["?"], "answer": ["1"], "heavy": [b"x" * 100]})
    assert Columns().select(table.column_names) == ["question", "answer"]
    named = Columns(question="heavy")
    assert named.select(table.column_names) == ["heavy", "answer"]


BAD = {
    "the options are not a list but str": {"question": "?", "answer": "a", "options": "a, b"},
    "the answer '1' is not among the options": {"question": "?", "answer": 1, "options": ["a", "b"]},
    "the answer is True, not text": {"question": "?", "answer": True},
    "the answer is nan, not text": {"question": "?", "answer": float("nan")},
    r"the answer is \['a'\], not text": {"question": "?", "answer": ["a"]},
    "the answer is empty": {"question": "?", "answer": "<answer> </answer>"},
    "the question is empty": {"question": "<image>\n", "answer": "a"},
    "image 0: int is not an image": {"question": "?", "answer": "a", "image": 7},
    "image 1: empty": {"question": "?", "answer": "a", "image": [PNG, None]},
    "is the answer": {"question": "?", "reply": "a"},
}


def test_a_number_may_name_an_option():
    assert parse_row({"question": "?", "answer": 3, "options": ["2", "3"]}).answer == "3"


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows(reason):
    with pytest.raises(InvalidRow, match=reason):
        parse_row(BAD[reason])


# --------------------------------------------------------------------------------- row_filter

TWO = {"image_bytes": [encoded(), encoded()]}


def test_static_is_one_image(tmp_path, caplog):
    """Rows outside of a row_filter are counted, and are no bad rows."""
    caplog.set_level("INFO", "vtfast")
    broken = [encoded()[:-300]] * 2
    rows = [sat_row(0), sat_row(1, **TWO), sat_row(2, image_bytes=broken), sat_row(3)]
    path = write_sat(tmp_path / "x.parquet", rows)
    samples = load_samples(path, row_filter=RowFilter(static=True), on_bad="error")
    assert [sample.row for sample in samples] == [0, 3]
    assert samples.skipped == []
    assert caplog.messages == [
        f"filtered out 2 of 4 rows, the first: {path}, row 1 (counted from 0): 2 images, --static takes rows with one"
    ]
    text = {"question": "?", "answer": "a"}
    with pytest.raises(FilteredOut, match="0 images"):
        parse_row(text, row_filter=RowFilter(static=True))
    with pytest.raises(InvalidRow, match="no image"):  # SAT's rows have some, or are broken
        parse_row(sat_row(image_bytes=[]), row_filter=RowFilter(static=True))


def test_question_types(tmp_path):
    kinds = ["other", "goal_aim", "other", "perspective"]
    rows = [sat_row(n, question_type=kind) for n, kind in enumerate(kinds)]
    path = write_sat(tmp_path / "x.parquet", rows)
    for wanted, found in {("other",): [0, 2], ("goal_aim", "perspective"): [1, 3]}.items():
        samples = load_samples(path, row_filter=RowFilter(question_types=wanted))
        assert [sample.row for sample in samples] == found
        assert {sample.question_type for sample in samples} == set(wanted)
    with pytest.raises(UserError, match=r"no usable row among 4.*row 0 \(counted from 0\): question_type other"):
        load_samples(path, row_filter=RowFilter(question_types=("ego_movement",)))
    with pytest.raises(InvalidRow, match="no question_type, which --question_types needs"):
        parse_row({"question": "?", "answer": "a"}, row_filter=RowFilter(question_types=("other",)))


def test_a_selection_and_first_rows_count_as_visualthinker_does(tmp_path):
    """Its script reads rows 0 to N - 1 and keeps those with one image."""
    rows = [sat_row(0), sat_row(1, **TWO), sat_row(2), sat_row(3)]
    path = write_sat(tmp_path / "x.parquet", rows)
    static = RowFilter(static=True)
    assert [s.row for s in load_samples(path, first_rows=3, row_filter=static)] == [0, 2]
    assert [s.row for s in load_samples(path, limit=3, row_filter=static)] == [0, 2, 3]
