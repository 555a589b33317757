"""Settings -> the training samples and the held-out ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from vtfast.config import RunConfig
from vtfast.data import AUTO_COLUMNS, Columns, RowFilter, Sample, load_samples, shuffle_options, synthetic
from vtfast.data.prompt_builder import PromptBuilder
from vtfast.data.skip_log import SkipLog

SYNTHETIC = "synthetic"
SYNTHETIC_TRAIN = 2048


def load_splits(
    config: RunConfig, prompt_builder: PromptBuilder, skip_log: SkipLog, rendered: Path
) -> dict[str, list[Sample]]:
    """Samples by split, "train" and "val" (held out; absent without `eval_data`). Invalid ones go to `skip_log`.

    `rendered`: the folder of `render_synthetic`; its files are read like any others.
    """
    sources = {
        "train": (config.data, config.split, config.first_n, config.first_rows),
        "val": (config.eval_data, config.eval_split, config.eval_samples, None),
    }
    samples = {}
    for split, (source, of_source, limit, first_rows) in sources.items():
        if source is None:
            continue
        path: str | Path = source
        named = columns(config)
        if source == SYNTHETIC:
            path, named = rendered / f"{split}.parquet", AUTO_COLUMNS
        loaded = load_samples(
            path,
            of_source,
            limit,
            on_bad=config.on_bad_sample,
            columns=named,
            row_filter=row_filter(config),
            first_rows=first_rows,
        )
        skip_log.add_rows(str(path), loaded.skipped, loaded.where)
        samples[split] = prompt_builder.drop_too_long(shuffle_options(loaded, config.seed), str(path), skip_log)
    return samples


def columns(config: RunConfig) -> Columns:
    """The column names that the settings give."""
    return Columns(config.question_column, config.answer_column, config.options_column, config.image_column)


def row_filter(config: RunConfig) -> RowFilter:
    """The rows that the settings ask for."""
    types = config.question_types
    return RowFilter(config.static, None if types is None else tuple(types))


def render_synthetic(config: RunConfig, folder: Path) -> Path:
    """Write train.parquet and val.parquet of the embedded default, if `config` asks for either."""
    if SYNTHETIC in (config.data, config.eval_data):
        synthetic.write_dataset(folder, train=SYNTHETIC_TRAIN, val=config.eval_samples, seed=config.seed)
    return folder


def samples_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of the samples in their order. Of images only the number counts: reading all of them takes minutes."""
    digest = hashlib.sha256()
    for sample in samples:
        entry = [sample.row, sample.question, sample.options, sample.answer, len(sample.images)]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()
