"""Small files in the true schemas, and the images in them."""

import io
import json
import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

# https://huggingface.co/datasets/array/SAT: `image_bytes` is a list of JPEG files.
SAT = pa.schema(
    [
        ("image_bytes", pa.list_(pa.binary())),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("question_type", pa.string()),
        ("correct_answer", pa.string()),
    ]
)
# https://huggingface.co/datasets/array/SAT-v2: the `datasets` library's Image structs.
SAT_V2 = pa.schema(
    [
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("correct_answer", pa.string()),
        ("question_type", pa.string()),
    ]
)


def picture(width: int = 40, height: int = 30, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth noise: every seed another picture, with something to lose in resizing."""
    noise = random.Random(f"{width}/{height}/{seed}/{mode}")
    small = Image.frombytes(mode, (5, 5), noise.randbytes(25 * len(mode)))
    return small.resize((width, height), Image.Resampling.BICUBIC)


# https://huggingface.co/datasets/leonardPKU/clevr_cogen_a_train, and GEOQA_R1V_Train_8K beside it.
R1_V = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("problem", pa.string()),
        ("solution", pa.string()),
    ]
)


def encoded(image: Image.Image | None = None, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that says it has that many pixels, and a few bytes of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def sat_row(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of `array/SAT` as pyarrow hands it over, with some values replaced."""
    row = {
        "image_bytes": [encoded(picture(seed=seed))],
        "question": f"How many Chairs are visible in the scene? ({seed})",
        "answers": ["3", "2", "6", "4", "5"],
        "question_type": "other",
        "correct_answer": "3",
    }
    return row | changes


def write_sat(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SAT), path, **options)
    return path


def write_sat_v2(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [row | {"images": [{"bytes": data, "path": None} for data in row["image_bytes"]]} for row in rows]
    pq.write_table(pa.Table.from_pylist(structs, SAT_V2), path)
    return path


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_visualthinker(path: Path, rows: list[dict[str, Any]], image_folder: Path) -> Path:
    """`SAT_train_15000.json` and `SAT_images_train/ROW_0.png`, as VisualThinker prepares SAT."""
    image_folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, row in enumerate(rows):
        name = f"{number}_0.png"
        Image.open(io.BytesIO(row["image_bytes"][0])).save(image_folder / name)
        options = ", ".join(row["answers"][:-1]) + " or " + row["answers"][-1]
        user = f"<image> Answer in natural language. {row['question']} Choose between the following options: {options}"
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": row["correct_answer"]}]
        entries.append({"messages": messages, "images": [f"{image_folder.name}/{name}"]})
    path.write_text(json.dumps(entries))
    return path


ROWS = [sat_row(seed) for seed in range(4)]


def assert_same_questions(samples: Sequence[Any], rows: list[dict[str, Any]]) -> None:
    """Whether samples are these rows of SAT, in order, pixel by pixel."""
    assert len(samples) == len(rows)
    for sample, row in zip(samples, rows, strict=True):
        assert (sample.question, sample.options) == (row["question"], row["answers"])
        assert sample.answer == row["correct_answer"]
        originals = [Image.open(io.BytesIO(data)) for data in row["image_bytes"]]
        assert [i.tobytes() for i in sample.images] == [i.tobytes() for i in originals]


def mixed_rows(path: Path) -> Path:
    """Questions with one image of different sizes, and every third without: some prompts are ten times as long."""
    rows = []
    for number in range(12):
        side = 28 * (2 + number % 5)
        image = io.BytesIO()
        Image.new("RGB", (side, side), (20 * number, 99, 99)).save(image, "PNG")
        rows.append(
            {
                "image_bytes": [] if number % 3 == 0 else [image.getvalue()],
                "question": "Is it left or right of the " + "red " * number + "square?",
                "answers": ["left", "right"],
                "question_type": "other",
                "correct_answer": "left",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
