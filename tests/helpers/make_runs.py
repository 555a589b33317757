"""Run folders as training and evaluation leave them, without any training."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from vtfast.report.read_run import Run, read_runs


def metrics_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "reward": 1.0,
        "rewards/accuracy": 0.4,
        "rewards/format": 0.6,
        "completions/mean_length": 100.0 + step,
        "kl": 0.01 * step,
        "entropy": 0.5,
        "clip_ratio/low": 0.0,
        "clip_ratio/high": 0.0,
        "grad_norm": 1.5,
        "sampler_drift": 1e-7,
        "time/rollout": 2.0,
        "time/score": 0.5,
        "time/update": 1.0,
        "time/step": 4.0,
        "tokens_per_second": 1000.0,
    }
    return row | changes


def completion_row(step: int, completion: str = "<think>so</think>", **changes: Any) -> dict:
    row = {
        "step": step,
        "row": 3,
        "kind": "count",
        "question": "How many chairs?",
        "answer": "3",
        "completion": completion,
        "reward": 1.0,
        "rewards": {"accuracy": 0.0, "format": 1.0},
        "advantage": 0.5,
        "length": 12,
        "finish_reason": "stop",
    }
    return row | changes


def write_run(
    folder: Path,
    metrics: Iterable[dict[str, Any]] = (),
    completions: Iterable[dict[str, Any]] = (),
    evaluations: dict[str, dict[str, Any]] | None = None,
    **config: Any,
) -> Path:
    folder.mkdir(parents=True)
    settings = {"model": "base", "data": "synthetic", "max_steps": 3, "num_generations": 4}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | config))
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "completions.jsonl", completions)
    for name, scores in (evaluations or {}).items():
        (folder / "evaluations" / name).mkdir(parents=True)
        (folder / "evaluations" / name / "scores.json").write_text(json.dumps(scores))
    return folder


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def file_name(text: str) -> str:
    return text.replace("/", "-").replace("\0", "")[:60]


def hostile_run(folder: Path, text: str) -> Path:
    """A run folder with `text` in every place that can hold text."""
    settings = {"model": text, "data": text, "reward_funcs": [text], "freeze": [text], text: text}
    scores = {text: {"total": 0.5, "by_task": {text: 0.5}}, "cvbench": {"total": text}}
    texts = dict.fromkeys(["question", "answer", "kind", "finish_reason"], text)
    metrics = [metrics_row(1, **{f"rewards/{text}": 1.0}), metrics_row(2)]
    completions = [completion_row(1, text, rewards={text: 1.0}, **texts)]
    run = write_run(folder, metrics, completions, {file_name(text): scores}, **settings)
    score = {"all": [0.5, 0.5], text: [0.5, 0.5]}
    part = {"count": 1, "scores": {"sampled": score, "greedy": score}}
    (run / "held_out.json").write_text(json.dumps({"before": part, "after": part}))
    return run


def read(folder: Path) -> Run:
    """A run folder as the report sees it."""
    return read_runs([folder])[0]
