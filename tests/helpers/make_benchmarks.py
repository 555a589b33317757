"""Tiny files of the benchmarks, in their true schemas and layouts."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from make_files import encoded, picture, sat_row, write_sat

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# https://huggingface.co/datasets/nyu-visionx/CV-Bench
CVBENCH = pa.schema(
    [
        ("idx", pa.int64()),
        ("type", pa.string()),
        ("task", pa.string()),
        ("image", IMAGE),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("prompt", pa.string()),
        ("filename", pa.string()),
        ("source", pa.string()),
        ("source_dataset", pa.string()),
        ("source_filename", pa.string()),
        ("target_class", pa.string()),
        ("target_size", pa.int64()),
        ("bbox", pa.list_(pa.list_(pa.float64()))),
    ]
)
# https://huggingface.co/datasets/BLINK-Benchmark/BLINK
BLINK = pa.schema(
    [
        ("idx", pa.string()),
        ("question", pa.string()),
        ("sub_task", pa.string()),
        *((f"image_{number}", IMAGE) for number in (1, 2, 3, 4)),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("prompt", pa.string()),
        ("explanation", pa.string()),
    ]
)


def image(seed: int = 0) -> dict[str, Any]:
    return {"bytes": encoded(picture(56, 56, seed)), "path": None}


def _prompt(question: str, choices: list[str], lead: str = " Select from the following choices.") -> str:
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCDEF", choices, strict=False))
    return f"{question}{lead}\n{listed}"


def cvbench_row(index: int = 0, task: str = "Count", **changes: Any) -> dict[str, Any]:
    """A row of CV-Bench; the first of each task is worded as a published one."""
    question, choices, source, lead = {
        "Count": ("How many organs are in the image?", ["3", "2", "1", "0"], "ADE20K", True),
        "Relation": (
            "Considering the relative positions of the dog and the sheep in the image provided, where is the dog"
            " located with respect to the sheep?",
            ["left", "right"],
            "COCO",
            True,
        ),
        "Depth": (
            "Which object is closer to the camera taking this photo, the door (highlighted by a red box) or the lamp"
            " (highlighted by a blue box)?",
            ["door", "lamp"],
            "Omni3D",
            False,
        ),
        "Distance": (
            "Estimate the real-world distances between objects in this image. Which object is closer to the towel"
            " (highlighted by a red box), the sink (highlighted by a blue box) or the toilet (highlighted by a green"
            " box)?",
            ["sink", "toilet"],
            "Omni3D",
            False,
        ),
    }[task]
    row = {
        "idx": index,
        "type": "2D" if lead else "3D",
        "task": task,
        "image": image(index),
        "question": question,
        "choices": choices,
        "answer": "(A)" if index % 2 else "(B)",
        "prompt": _prompt(question, choices, " Select from the following choices." if lead else ""),
        "filename": f"img/{task.lower()}_{index}.png",
        "source": source,
        "source_dataset": f"{source} Validation Set",
        "source_filename": f"{index}.jpg",
        "target_class": None,
        "target_size": None,
        "bbox": None if lead else [[1.0, 2.0, 30.0, 40.0], [50.0, 10.0, 60.0, 30.0]],
    }
    return row | changes


def blink_row(index: int = 0, task: str = "Spatial_Relation", **changes: Any) -> dict[str, Any]:
    question, choices = {
        "Spatial_Relation": ("Is the car beneath the cat?", ["yes", "no"]),
        "Relative_Depth": ("Which point is closer to the camera?", ["A is closer", "B is closer"]),
    }[task]
    row = {
        "idx": f"val_{task}_{index}",
        "question": question,
        "sub_task": task,
        "image_1": image(index),
        "image_2": None,
        "image_3": None,
        "image_4": None,
        "choices": choices,
        "answer": "(A)" if index % 2 else "(B)",
        "prompt": _prompt(question, choices, "\nSelect from the following choices."),
        "explanation": "",
    }
    return row | changes


def vsr_row(index: int = 0, zeroshot: bool = False, **changes: Any) -> dict[str, Any]:
    name = f"{index:012d}.jpg"
    row = {
        "image": name,
        "image_link": f"http://images.cocodataset.org/train2017/{name}",
        "caption": "The cup is left of the plate.",
        "label": index % 2,
        "relation": "left of",
        "annotator_id": 29,
        "vote_true_validator_id": "[2, 9]",
        "vote_false_validator_id": "[3]",
    }
    row |= {"subj": "cup", "obj": "plate"} if zeroshot else {"reference_frame": None}
    return row | changes


def write_cvbench(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """`test_2d.parquet` and `test_3d.parquet`."""
    for dimension in ("2D", "3D"):
        part = [row for row in rows if row["type"] == dimension]
        write_parquet(folder / f"test_{dimension.lower()}.parquet", part, CVBENCH)
    return folder


def write_blink(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """`SUB_TASK/val-00000-of-00001.parquet` for each task."""
    for task in sorted({row["sub_task"] for row in rows}):
        part = [row for row in rows if row["sub_task"] == task]
        write_parquet(folder / task / "val-00000-of-00001.parquet", part, BLINK)
    return folder


def write_vsr(folder: Path, rows: list[dict[str, Any]], images: Path | None = None) -> Path:
    """`test.jsonl`, and the images beside it or in a folder."""
    images = images or folder
    for place in (folder, images):
        place.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for number, row in enumerate(rows):
        (images / row["image"]).write_bytes(encoded(picture(56, 56, number)))
    return folder


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


ROW = {"cvbench": cvbench_row, "blink": blink_row, "vsr": vsr_row, "sat": sat_row}
"""Makes a row of each benchmark: (number, **changes)."""


def sample_rows() -> dict[str, list[dict[str, Any]]]:
    """A small copy of every benchmark, by name."""
    depths = ["Relative_Depth", "Spatial_Relation"] * 2
    cvbench = ["Count", "Relation", "Count", "Depth", "Distance", "Depth"]
    sat = [sat_row(number, image_bytes=[image(number)["bytes"]]) for number in range(3)]
    pair = [image(1)["bytes"], image(2)["bytes"]]
    return {
        "cvbench": [cvbench_row(number, task) for number, task in enumerate(cvbench)],
        "blink": [blink_row(number, task) for number, task in enumerate(depths)],
        "vsr": [vsr_row(number) for number in range(4)],
        "sat": [*sat, sat_row(9, image_bytes=pair, question_type="obj_movement")],
    }


def write_all(folder: Path) -> dict[str, Path]:
    """`sample_rows` in the layout of each, by name."""
    rows = sample_rows()
    return {
        "cvbench": write_cvbench(folder / "cvbench", rows["cvbench"]),
        "blink": write_blink(folder / "blink", rows["blink"]),
        "vsr": write_vsr(folder / "vsr", rows["vsr"], folder / "vsr" / "images"),
        "sat": write_sat(folder / "SAT_test.parquet", rows["sat"]),
    }


COUNTS = {bench: len(rows) for bench, rows in sample_rows().items()}


def flags(files: dict[str, Path], *more: str) -> list[str]:
    data = ",".join(f"{bench}={path}" for bench, path in files.items())
    return ["--bench", ",".join(files), "--data", data, "--max_completion_length", "12", *more]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
