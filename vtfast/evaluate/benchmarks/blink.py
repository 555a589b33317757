"""BLINK (BLINK-Benchmark/BLINK): the validation rows of its two spatial tasks, 124 + 143, one image each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtfast.evaluate.benchmark import Benchmark, Example, Grade, accuracy, images_of, lettered_gold, options_of, text_of

TASKS = ("Relative_Depth", "Spatial_Relation")


def read(row: Mapping[str, Any], index: int) -> Example:
    options = options_of(row, "choices")
    return Example(
        index=index,
        task=text_of(row, "sub_task"),
        source="BLINK",
        question=text_of(row, "prompt"),
        options=options,
        gold=lettered_gold(row, options),
        images=images_of([row.get("image_1")]),
    )


def has_one_image(row: Mapping[str, Any]) -> bool:
    return row.get("image_2") is None


def official_score(grades: Sequence[Grade]) -> float:
    """Unweighted mean over the tasks present."""
    tasks = sorted({grade.task for grade in grades})
    scores = [accuracy([grade for grade in grades if grade.task == task]) for task in tasks]
    return sum(scores) / len(scores)


BENCHMARK = Benchmark(
    name="blink",
    title="BLINK",
    hub_id="BLINK-Benchmark/BLINK",
    files=(rf"(?:{'|'.join(TASKS)})/val-.*\.parquet", r"val(?:-.*)?\.parquet"),
    columns=("sub_task", "prompt", "choices", "answer", "image_1", "image_2"),
    read=read,
    official_score=official_score,
    sizes=(124 + 143,),
    tasks=TASKS,
    include_row=has_one_image,
)
