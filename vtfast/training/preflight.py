"""Checks before a model is loaded: the files and names in the settings, and the model's config.json. All problems are
reported at once."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from vtfast.config import Config, RunConfig, SettingsError
from vtfast.config.rules import PIXELS_A_TOKEN
from vtfast.data import Sample
from vtfast.data.data_files import find_files
from vtfast.data.processor import Processor
from vtfast.data.prompt_templates import load_template, render
from vtfast.data.splits import SYNTHETIC
from vtfast.model.attention import choose_backend
from vtfast.model.loading import parse_dtype, read_model_config
from vtfast.model.meta_model import meta_policy_for_run
from vtfast.report.tracking import check_trackers
from vtfast.rewards import get_reward
from vtfast.rollout.attention import decode_attention
from vtfast.rollout.engine import PAGE_SIZE
from vtfast.rollout.kv_cache import pages_needed
from vtfast.rollout.vllm import check_installed
from vtfast.training.checkpoint import check_output_dir
from vtfast.training.sft_target import load_target
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand
from vtfast.utils.hub import is_hub_id, model_path

log = logging.getLogger("vtfast")


def check_start(config: RunConfig) -> None:
    """Raises SettingsError with every problem that would stop a run of `config` on this machine later. Warnings go to
    the log."""
    problems = list(find_problems(config))
    if problems:
        raise SettingsError(problems)
    for warning in config.warnings():
        log.warning("%s", warning)


def find_problems(config: RunConfig) -> Iterator[str]:
    """One line for each problem."""
    checks: list[tuple[str, Callable[[], object]]] = [
        ("output_dir", lambda: check_output_dir(config)),
        ("report_to", lambda: check_trackers(config.report_to)),
        ("use_vllm", lambda: _check_engine(config)),
        ("template", lambda: load_template(config.template)),
        ("data", lambda: _check_data(config.data, config.split)),
        ("eval_data", lambda: _check_data(config.eval_data, config.eval_split)),
        ("device", lambda: _check_device(config)),
        ("model", lambda: _check_model(config)),
    ]
    if isinstance(config, Config):
        for name in config.reward_funcs:
            checks.append(("reward_funcs", functools.partial(get_reward, name, config.reward_mode)))
    else:
        checks.append(("target", lambda: load_target(config.target)))
    for flag, check in checks:
        try:
            check()
        except UserError as error:
            for problem in getattr(error, "problems", [str(error)]):
                yield problem if "--" in problem.split(":")[0] else f"--{flag}: {problem}"


def _check_data(source: str | None, split: str | None) -> None:
    """Look for local files. The hub is asked when its rows are read."""
    if source in (None, SYNTHETIC):
        return
    if expand(source).exists() or not is_hub_id(source):
        find_files(source, split, stream=True)


def _check_engine(config: RunConfig) -> None:
    if config.use_vllm:
        check_installed()


def _kind(config: RunConfig) -> str:
    """cpu or cuda, even if there is no CUDA device."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    return there if config.device == "auto" else config.device


def _check_device(config: RunConfig) -> None:
    kind, problems = _kind(config), []
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device; use --device cpu or auto")
    dtype = parse_dtype(config.dtype, kind)
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else "cpu"
    for choose, wanted in ((choose_backend, config.attn_implementation), (decode_attention, config.rollout_attention)):
        try:
            choose(wanted, device, dtype)
        except UserError as error:
            problems.append(str(error))
    if not config.use_vllm and config.rollout_cache_tokens is not None:
        page, group = PAGE_SIZE[kind], config.num_generations if isinstance(config, Config) else 1
        shared, own = pages_needed(page, config.max_prompt_length, config.max_completion_length)
        least = (shared + group * own) * page
        if config.rollout_cache_tokens < least:
            problems.append(
                f"--rollout_cache_tokens {config.rollout_cache_tokens}: one prompt of --max_prompt_length with its"
                f" {group} completions of --max_completion_length takes {least} tokens in pages of {page};"
                f" raise it to {least}, or lower these"
            )
    if problems:
        raise SettingsError(problems)


def _check_model(config: RunConfig) -> None:
    """The family, the frozen or adapted parts, and whether a prompt has room for the template and an image."""
    path = model_path(config.model)
    if config.use_peft and (Path(path) / "adapter_config.json").is_file():
        raise UserError(
            f"--model {config.model}: has LoRA adapters already, which new ones would ignore; save the"
            " merged model first (vtfast.model.load_model(folder).module.save_pretrained(new folder))"
        )
    model, problems = read_model_config(config.model), []
    try:
        meta_policy_for_run(model, config, torch.float32)
    except UserError as error:
        problems.append(str(error))
    processor = Processor.from_pretrained(path, config.min_pixels, config.max_pixels)
    problems += _prompt_problems(config, processor)
    if problems:
        raise SettingsError(problems)


def _prompt_problems(config: RunConfig, processor: Processor) -> Iterator[str]:
    """A line if not even an empty question fits, with the smallest image if the model takes images."""
    try:
        template = load_template(config.template)
    except UserError:  # another check reports it
        return
    limit, images = config.max_prompt_length, [] if processor.image_processor is None else [None]
    empty = render(template, Sample("", [], "", images), literal_image=config.literal_image)
    least = processor.prompt_length(empty, [])
    if images:
        least += -(-config.min_pixels // PIXELS_A_TOKEN) - 1  # one placeholder stands in the text
    if least > limit:
        image = f" and the smallest image (--min_pixels {config.min_pixels})" if images else ""
        yield (
            f"--max_prompt_length {limit}: --template {config.template}{image} take{'' if images else 's'} {least}"
            " tokens without any question; raise it, or use a shorter template"
        )
