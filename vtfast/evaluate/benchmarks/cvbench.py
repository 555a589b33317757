"""CV-Bench (nyu-visionx/CV-Bench): counting and relations in 2D, depth and distance in 3D; 2,638 rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtfast.evaluate.benchmark import Benchmark, Example, Grade, accuracy, images_of, lettered_gold, options_of, text_of

SOURCES = {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)}


def read(row: Mapping[str, Any], index: int) -> Example:
    options = options_of(row, "choices")
    return Example(
        index=index,
        task=text_of(row, "task"),
        source=text_of(row, "source"),
        question=text_of(row, "prompt"),
        options=options,
        gold=lettered_gold(row, options),
        images=images_of([row.get("image")]),
    )


def official_score(grades: Sequence[Grade]) -> float:
    """((ADE20K + COCO) / 2 + Omni3D) / 2. Each mean is over the sources, and then the halves, that are present."""
    halves = []
    for sources in SOURCES.values():
        parts = [[grade for grade in grades if grade.source == source] for source in sources]
        scores = [accuracy(part) for part in parts if part]
        if scores:
            halves.append(sum(scores) / len(scores))
    return sum(halves) / len(halves) if halves else accuracy(grades)


BENCHMARK = Benchmark(
    name="cvbench",
    title="CV-Bench",
    hub_id="nyu-visionx/CV-Bench",
    files=(r"test_[23]d\.parquet", r"(?:data/)?test(?:-\d+-of-\d+)?\.parquet"),
    columns=("task", "source", "prompt", "choices", "answer", "image"),
    read=read,
    official_score=official_score,
    sizes=(2638,),
    tasks=("Count", "Relation", "Depth", "Distance"),
)
