"""SAT's own held-out rows (array/SAT): `SAT_test.parquet`, 150 real photographs, or `SAT_val.parquet`, 4,001 rendered.

Asked as in training: option texts in a random order for each row, without letters. So a letter is not an answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from vtfast.data import InvalidRow, question_kind
from vtfast.data.prompt_templates import join_options
from vtfast.data.row_parser import clean_option
from vtfast.evaluate.benchmark import Benchmark, Example, accuracy, images_of, options_of, text_of


def read(row: Mapping[str, Any], index: int) -> Example:
    options = [clean_option(option) for option in options_of(row, "answers")]
    answer = clean_option(text_of(row, "correct_answer"))
    if answer not in options:
        raise InvalidRow(f"the answer {answer!r} is not among the options {options}")
    random.Random(f"SAT/{index}").shuffle(options)  # the generator puts the right one first
    question = text_of(row, "question")
    values = row.get("image_bytes") or row.get("images") or []
    return Example(
        index=index,
        task=question_kind(question, row.get("question_type")),
        source="SAT",
        question=f" Answer in natural language. {question} Choose between the following options: "
        + join_options(options),
        options=tuple(options),
        gold=options.index(answer),
        images=images_of(values),
    )


BENCHMARK = Benchmark(
    name="sat",
    title="SAT",
    hub_id="array/SAT",
    files=(r"(?:data/)?(?:SAT_)?test(?:-\d+-of-\d+)?\.parquet", r"(?:data/)?(?:SAT_)?val(?:-\d+-of-\d+)?\.parquet"),
    columns=("question", "answers", "correct_answer", "question_type"),
    read=read,
    official_score=accuracy,
    sizes=(150, 4001),
    has_lettered_options=False,
)
