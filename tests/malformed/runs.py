"""What a run leaves behind, as another person's: its folder for a report, its answers; and benchmark files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from make_benchmarks import cvbench_row, vsr_row, write_cvbench, write_vsr
from make_runs import completion_row, metrics_row, write_run

from malformed import WORKS, Kind, command
from malformed.configs import SETTINGS
from malformed.data import ARRAYS, BASE, _parquet, processor
from malformed.values import damage, json_bytes


def run_folder(changes: tuple[str, bytes], folder: Path) -> str:
    """Its report is whole, or not there."""
    name, data = changes
    run = write_run(
        folder / "run",
        [metrics_row(1), metrics_row(2)],
        [completion_row(1), completion_row(2)],
        {"step-2": {"cvbench": {"total": 0.5, "by_task": {"Count": 0.5}, "count": 10}}},
    )
    (run / "held_out.json").write_text(json.dumps(HELD_OUT))
    (run / name).write_bytes(data)
    try:
        ending = command("report", str(run))
    finally:
        page = run / "report.html"
        assert not page.exists() or page.read_text("utf-8").endswith("</html>\n")
    assert page.exists()
    return ending


HELD_OUT = {
    when: {"count": 4, "scores": {mode: {"all": [0.5, 0.5]} for mode in ("sampled", "greedy")}}
    for when in ("before", "after")
}
SCORES = {"cvbench": {"total": 0.5, "by_task": {"Count": 0.5}, "count": 10}}
RUN_FILES = st.one_of(
    st.tuples(st.just("metrics.jsonl"), json_bytes(metrics_row(3)).map(lambda x: x + b"\n")),
    st.tuples(st.just("completions.jsonl"), json_bytes(completion_row(3)).map(lambda x: x + b"\n")),
    st.tuples(st.just("evaluations/step-2/scores.json"), json_bytes(SCORES)),
    st.tuples(st.just("held_out.json"), json_bytes(HELD_OUT)),
    st.tuples(
        st.just("config.yaml"), SETTINGS.map(lambda x: x if isinstance(x, bytes) else x.encode("utf-8", "replace"))
    ),
)


def answers(changes: tuple[str, bytes], folder: Path) -> str:
    """An evaluation's answers, scored again."""
    name, data = changes
    home = folder / "evaluations" / BASE.name
    home.mkdir(parents=True)
    for file, rows in (("cvbench.jsonl", [ANSWER, ANSWER | {"index": 1}]), ("settings.json", [{}])):
        (home / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / name).write_bytes(data)
    return command("eval", "--model", str(BASE), "--rescore", "--output_dir", str(folder))


ANSWER = {
    "index": 0,
    "task": "Count",
    "source": "COCO",
    "question": "How many?",
    "options": ["1", "2"],
    "gold": "A",
    "images": "",
    "response": "<answer>1</answer>",
    "correct": True,
    "strict_correct": True,
    "tokens": 4,
    "finish_reason": "stop",
}
ANSWERS = st.one_of(
    st.tuples(st.just("cvbench.jsonl"), json_bytes(ANSWER).map(lambda line: line + b"\n")),
    st.tuples(st.just("cvbench.jsonl"), json_bytes(ANSWER).map(lambda line: line + b"\n")),
    st.tuples(st.just("settings.json"), json_bytes({"cvbench": {"template": "x", "min_pixels": 1}})),
    st.tuples(st.just("scores.json"), json_bytes(SCORES)),
)


def checkpoint(text: str | bytes, folder: Path) -> str:
    """What an evaluation takes from the config.yaml of a run."""
    from vtfast.evaluate.resolve_model import default_template, find_model

    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "config.json").write_text("{}")
    data = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    (folder / "config.yaml").write_bytes(data)
    default_template(find_model(str(folder)), None)
    return WORKS


def benchmark(given_input: tuple[str, Any], folder: Path) -> str:
    """Asked in a few tokens, answered into a folder."""
    from vtfast.evaluate import evaluate

    bench, change = given_input
    if bench == "vsr":
        data = write_vsr(folder / "vsr", [vsr_row(0), vsr_row(1)])
        (data / "test.jsonl").write_bytes(change)
    else:
        data = write_cvbench(folder / "cvbench", [cvbench_row(0), cvbench_row(1, "Depth")])
        (data / "test_2d.parquet").write_bytes(change)
    output = folder / "out"
    evaluate(policy(), bench, data, processor=processor(), max_completion_length=2, output=output, progress=False)
    return WORKS


@cache
def policy() -> Any:
    from vtfast.model.loading import load_model

    return load_model(BASE)


@cache
def _cvbench() -> Any:

    import pyarrow as pa
    from make_benchmarks import CVBENCH

    return pa.Table.from_pylist([cvbench_row(seed) for seed in range(3)], CVBENCH)


@st.composite
def cvbench(draw: st.DrawFn) -> tuple[str, bytes]:
    columns = {name: _cvbench()[name] for name in _cvbench().column_names}
    name = draw(st.sampled_from(["task", "image", "choices", "answer", "prompt", "source"]))
    if draw(st.integers(0, 5)) == 0:
        del columns[name]
    else:
        columns[name] = draw(st.sampled_from(ARRAYS))
    data = _parquet(columns)
    return "cvbench", draw(damage(data)) if draw(st.integers(0, 2)) == 0 else data


VSR = json_bytes(vsr_row(0)).map(lambda line: ("vsr", line + b"\n"))

KINDS = [
    Kind("runs: report", RUN_FILES, run_folder, 60),
    Kind("runs: config.yaml for an evaluation", SETTINGS, checkpoint, 40),
    Kind("evaluations: answers", ANSWERS, answers, 60),
    Kind("benchmarks: VSR", VSR, benchmark, 25),
    Kind("benchmarks: CV-Bench", cvbench(), benchmark, 25),
]
