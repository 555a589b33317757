"""Checks before a model is loaded: the files and names in the settings, and the model's config.json. All problems are
reported at once."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.version import Version
from vtfast_kernels.silu_mul import silu_mul

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
from vtfast.utils.text import first_line

DEEPSPEED = Version("0.19.8"), Version("0.20")
"""Versions that vtfast runs with: from the first up to the second."""
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
    yield from _deepspeed_problems()
    yield from _problems("output_dir", lambda: check_output_dir(config))
    yield from _problems("report_to", lambda: check_trackers(config.report_to))
    if config.use_vllm:
        yield from _problems("use_vllm", check_installed)
    template_problems = list(_problems("template", lambda: load_template(config.template)))
    yield from template_problems
    yield from _problems("data", lambda: _check_data(config.data, config.split))
    yield from _problems("eval_data", lambda: _check_data(config.eval_data, config.eval_split))
    yield from _device_problems(config)
    model_problems = list(_problems("model", lambda: _check_model(config)))
    yield from model_problems
    if not model_problems:
        model = read_model_config(config.model)
        yield from _problems("model", lambda: meta_policy_for_run(model, config, torch.float32))
        if not template_problems:
            yield from _problems("model", lambda: _check_prompt_length(config))
    if isinstance(config, Config):
        for name in config.reward_funcs:
            yield from _problems("reward_funcs", functools.partial(get_reward, name, config.reward_mode))
    else:
        yield from _problems("target", lambda: load_target(config.target))


def _problems(flag: str, check: Callable[[], object]) -> Iterator[str]:
    """The UserError that `check` raises, with the flag unless it names one."""
    try:
        check()
    except UserError as error:
        for problem in error.problems if isinstance(error, SettingsError) else [str(error)]:
            yield problem if "--" in problem.split(":")[0] else f"--{flag}: {problem}"


def _deepspeed_problems() -> Iterator[str]:
    """0.19.0 and 0.19.1 round rotary frequencies to bf16, those up to 0.19.7 add up micro-batches in bf16, and other
    series have other internals."""
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        version = "is not installed"
    else:
        if DEEPSPEED[0] <= Version(version) < DEEPSPEED[1]:
            return
    yield f"deepspeed {version}: pip install 'deepspeed>={DEEPSPEED[0]},<{DEEPSPEED[1]}'"


def _triton_problems(device: torch.device) -> Iterator[str]:
    """Whether a kernel can be built: at its first launch Triton compiles C on this machine."""
    try:
        silu_mul(torch.ones(1, 16, dtype=torch.bfloat16, device=device))
    except Exception as error:
        yield (
            f"Triton cannot build a kernel ({first_line(error)}); it needs a C compiler and Python's headers, on Debian"
            " `apt install gcc python3-dev`, or CC set to a compiler"
        )


def _check_data(source: str | None, split: str | None) -> None:
    """Look for local files. The hub is asked when its rows are read."""
    if source in (None, SYNTHETIC):
        return
    if expand(source).exists() or not is_hub_id(source):
        find_files(source, split, stream=True)


def _device_problems(config: RunConfig) -> Iterator[str]:
    """The device, the attention backends on it, and the size of the cache."""
    cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    if cuda and not torch.cuda.is_available():
        yield "--device cuda: PyTorch sees no CUDA device; use --device cpu or auto"
        return
    kind = "cuda" if cuda else "cpu"
    dtype = parse_dtype(config.dtype, kind)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        yield from _triton_problems(torch.device(device))
    for choose, wanted in ((choose_backend, config.attn_implementation), (decode_attention, config.rollout_attention)):
        yield from _problems("device", functools.partial(choose, wanted, device, dtype))
    if config.use_vllm or config.rollout_cache_tokens is None:
        return
    page, group = PAGE_SIZE[kind], config.num_generations if isinstance(config, Config) else 1
    shared, own = pages_needed(page, config.max_prompt_length, config.max_completion_length)
    least = (shared + group * own) * page
    if config.rollout_cache_tokens < least:
        yield (
            f"--rollout_cache_tokens {config.rollout_cache_tokens}: one prompt of --max_prompt_length with its"
            f" {group} completions of --max_completion_length takes {least} tokens in pages of {page};"
            f" raise it to {least}, or lower these"
        )


def _check_model(config: RunConfig) -> None:
    """The model's folder and its family."""
    if config.use_peft and (Path(model_path(config.model)) / "adapter_config.json").is_file():
        raise UserError(
            f"--model {config.model}: has LoRA adapters already, which new ones would ignore; save the"
            " merged model first (vtfast.model.load_model(folder).module.save_pretrained(new folder))"
        )
    read_model_config(config.model)


def _check_prompt_length(config: RunConfig) -> None:
    """Whether an empty question fits, with the smallest image if the model takes images."""
    processor = Processor.from_pretrained(model_path(config.model), config.min_pixels, config.max_pixels)
    limit, images = config.max_prompt_length, [] if processor.image_processor is None else [None]
    empty = render(load_template(config.template), Sample("", [], "", images), literal_image=config.literal_image)
    least = processor.prompt_length(empty, [])
    if images:
        least += -(-config.min_pixels // PIXELS_A_TOKEN) - 1  # one placeholder stands in the text
    if least > limit:
        image = f" and the smallest image (--min_pixels {config.min_pixels})" if images else ""
        raise UserError(
            f"--max_prompt_length {limit}: --template {config.template}{image} take{'' if images else 's'} {least}"
            " tokens without any question; raise it, or use a shorter template"
        )
