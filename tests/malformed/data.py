"""Rows of data in all kinds of files, and images."""

from __future__ import annotations

import io
import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from make_benchmarks import IMAGE
from make_files import SAT, encoded, picture, sat_row

import vtfast
from malformed import SKIPPED, WORKS, Kind
from malformed.values import DEEP, VALUES, changed, damage, json_bytes

BASE = Path(vtfast.__file__).parent / "model" / "assets" / "tiny-spatial-base"


def rows(file: tuple[str, bytes], folder: Path) -> str:
    """Read, shuffled, rendered and tokenized, as a run does it. What is skipped is told by its number."""
    from vtfast.data import load_samples, shuffle_options
    from vtfast.data.prompt_templates import load_template, render

    name, data = file
    (folder / name).write_bytes(data)
    samples = load_samples(folder / name)
    for sample in shuffle_options(samples, 0):
        text = render(load_template("r1-zero"), sample)
        processor().encode(text, sample.images)
        json.dumps([sample.question, sample.kind, sample.answer]).encode()
    numbers = [number for number, _ in samples.skipped]
    assert sorted({*numbers, *(s.row for s in samples)}) == list(range(len(numbers) + len(samples)))
    return SKIPPED if numbers else WORKS


@cache
def processor() -> Any:
    from vtfast.data import Processor

    return Processor.from_pretrained(BASE, max_pixels=56 * 56)


GOOD = {"question": "Where?", "options": ["left", "right"], "answer": "left"}
MESSAGES = {
    "messages": [
        {"role": "user", "content": "<image> Where? Choose between the following options: a or b"},
        {"role": "assistant", "content": "a"},
    ],
    "images": ["x.png"],
}


def _lines(row: Any) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in (GOOD, row, GOOD))


JSON_ROWS = st.one_of(
    changed(GOOD),
    changed(MESSAGES),
    VALUES,
    st.dictionaries(st.sampled_from(["image", "images", "question_type", *GOOD]), VALUES).map(lambda x: GOOD | x),
)
JSONL = st.one_of(
    JSON_ROWS.map(_lines), JSON_ROWS.map(_lines), damage(_lines(GOOD)), DEEP.map(lambda text: text.encode() + b"\n")
).map(lambda data: ("rows.jsonl", data))
JSON_FILES = st.one_of(JSON_ROWS.map(lambda row: json.dumps([GOOD, row]).encode()), json_bytes([GOOD, MESSAGES])).map(
    lambda data: ("rows.json", data)
)


def _parquet(columns: dict[str, pa.Array]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


SAT_ROWS = pa.Table.from_pylist([sat_row(seed) for seed in range(3)], SAT)
INVALID = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.py_buffer(struct.pack("4i", 0, 1, 2, 3)), pa.py_buffer(b"\xff\xfe\x80")]
)
"""Three texts that are no UTF-8."""
ARRAYS = [
    INVALID,
    pa.nulls(3),
    pa.array(["a" * 100_000] * 3),
    pa.array(["a", "b", "a"]).dictionary_encode(),
    pa.array(["9" * 30] * 3).cast(pa.decimal128(38)),
    *(
        pa.array(values, kind)
        for values, kind in [
            ([1, 2, 3], pa.int8()),
            ([2**63] * 3, pa.uint64()),
            ([1.5, float("nan"), float("inf")], pa.float64()),
            ([True, False, None], pa.bool_()),
            (["a", "", None], pa.string()),
            (["3", "2", "\0"], pa.large_string()),
            ([b"", b"\x89PNG", None], pa.binary()),
            ([0, 1, 2], pa.date32()),
            ([0, 1, 2**40], pa.timestamp("s")),
            ([2**45] * 3, pa.timestamp("s")),
            ([10**18] * 3, pa.timestamp("ns")),
            ([2**62] * 3, pa.time64("ns")),
            ([1, 2, 3], pa.duration("ns")),
            ([[], None, ["x"]], pa.list_(pa.string())),
            ([["3", None, "2"]] * 3, pa.list_(pa.string())),
            ([[["deep"]]] * 3, pa.list_(pa.list_(pa.string()))),
            ([[encoded(kind="ICO")]] * 3, pa.list_(pa.binary())),
            ([[encoded()[:200]]] * 3, pa.list_(pa.binary())),
            ([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
            ([{"bytes": b"x", "path": "/dev/zero"}] * 3, IMAGE),
            ([{"bytes": None, "path": None}] * 3, IMAGE),
            ([{"bytes": None, "path": "/dev/zero"}] * 3, IMAGE),
        ]
    ),
]
"""Columns of three rows."""


@st.composite
def parquet(draw: st.DrawFn) -> tuple[str, bytes]:
    columns = {name: SAT_ROWS[name] for name in SAT_ROWS.column_names}
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(list(columns)))
        if draw(st.integers(0, 5)) == 0:
            del columns[name]
        else:
            columns[name] = draw(st.sampled_from(ARRAYS))
    return "rows.parquet", _parquet(columns)


PARQUET = parquet() | damage(_parquet({n: SAT_ROWS[n] for n in SAT_ROWS.column_names})).map(
    lambda data: ("rows.parquet", data)
)


def image(data: bytes, folder: Path) -> str:
    from vtfast.data.images import Images, image_sizes

    (folder / "rows.jsonl").write_bytes(_lines(GOOD | {"image": "picture"}))
    (folder / "picture").write_bytes(data)
    ending = rows(("rows.jsonl", (folder / "rows.jsonl").read_bytes()), folder)
    if ending == WORKS:
        assert image_sizes(Images([data])) == [picture_.size for picture_ in Images([data])]
    return ending


ALLOWED = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]
OTHERS = ["TIFF", "ICO", "PPM", "TGA", "PCX", "ICNS", "EPS", "PDF", "JPEG2000", "AVIF", "DDS", "SGI", "IM"]


@cache
def _picture(kind: str) -> bytes:
    return encoded(picture(64, 64), kind)


@st.composite
def images(draw: st.DrawFn) -> bytes:
    data = _picture(draw(st.sampled_from([*ALLOWED * 5, *OTHERS])))
    if draw(st.integers(0, 9)) == 0:  # another format's beginning
        other = _picture(draw(st.sampled_from(ALLOWED + OTHERS)))
        return other[: draw(st.integers(1, 40))] + data[draw(st.integers(0, 40)) :]
    if draw(st.integers(0, 2)) == 0:  # sizes and counts stand in a file's first bytes
        place = draw(st.integers(4, 40))
        return data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place + 8 :]
    return draw(damage(data))


KINDS = [
    Kind("rows: JSONL", JSONL, rows, 80),
    Kind("rows: JSON", JSON_FILES, rows, 50),
    Kind("rows: parquet", PARQUET, rows, 60),
    Kind("images", images(), image, 150),
]
