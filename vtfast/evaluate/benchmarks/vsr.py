"""Visual Spatial Reasoning (cambridgeltl/vsr_random, or vsr_zeroshot): is a caption true of an image? 2,195 test rows.

The data set has no images, only the names and links of COCO's. They lie beside the JSONL, in `images/`, or in a folder
of the user's choice; `vtfast.evaluate.vsr_images` finds and, on request, downloads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtfast.data import InvalidRow
from vtfast.evaluate.benchmark import Benchmark, Example, accuracy, text_of

QUESTION = (
    'Please analyze the provided image. Does the statement "{caption}" accurately describes what you see? '
    "Choose from (A) True or (B) False."
)
"""The study's text, word for word."""
OPTIONS = ("True", "False")


def read(row: Mapping[str, Any], index: int) -> Example:
    label = row.get("label")
    if label not in (0, 1):
        raise InvalidRow(f"label is {label!r}, expected 0 or 1")
    name, url = row.get("image"), row.get("image_link")
    if isinstance(name, str) and (name != Path(name).name or name == ".." or len(name) > 200):
        raise InvalidRow(f"image is {name!r}, expected a file name")
    return Example(
        index=index,
        task=text_of(row, "relation"),
        source="zeroshot" if "subj" in row else "random",
        question=QUESTION.format(caption=text_of(row, "caption")),
        options=OPTIONS,
        gold=0 if label == 1 else 1,
        images=(Path(name),) if isinstance(name, str) else (),
        image_url=url if isinstance(url, str) else "",
    )


BENCHMARK = Benchmark(
    name="vsr",
    title="VSR",
    hub_id="cambridgeltl/vsr_random",
    files=(r"(?:.*/)?test\.jsonl",),
    columns=("image", "caption", "label", "relation"),
    read=read,
    official_score=accuracy,
    sizes=(2195, 1222),
)
