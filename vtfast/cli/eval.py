"""`vtfast eval`."""

from __future__ import annotations

import argparse
import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vtfast.cli.arguments import Parser, WholeWords, one_of, whole_number
from vtfast.config import SettingsError
from vtfast.data.prompt_templates import load_template
from vtfast.evaluate import BENCHMARKS
from vtfast.utils.did_you_mean import did_you_mean
from vtfast.utils.errors import UserError
from vtfast.utils.files import check_inside, expand
from vtfast.utils.hub import model_path
from vtfast.utils.terminal import show

if TYPE_CHECKING:
    from vtfast.evaluate.resolve_model import EvaluatedModel

log = logging.getLogger("vtfast")
DEFAULT = next(iter(BENCHMARKS))
EXAMPLES = """examples:
  vtfast eval --model runs/x/checkpoints/last --bench cvbench,blink
  vtfast eval --model Qwen/Qwen2-VL-2B --bench vsr --data vsr=/data/test.jsonl --image_folder /data/coco
  torchrun --nproc_per_node 8 --no-python vtfast eval --model runs/x/checkpoints/last
"""


class _WithExamples(WholeWords, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples."""


def run(arguments: Sequence[str]) -> int:
    options = _parser().parse(arguments, _problems)
    benches, data = _names(options.bench), dict(pair.split("=", 1) for pair in _pairs(options.data))

    from vtfast.evaluate.resolve_model import check_model, find_model
    from vtfast.evaluate.score_table import score_table
    from vtfast.evaluate.scores import write_scores

    checkpoint = find_model(options.model)
    home = expand(options.output_dir) if options.output_dir else checkpoint.output_root
    folder = home / "evaluations" / checkpoint.name
    check_inside(home, *(folder / f"{bench}.jsonl" for bench in BENCHMARKS))
    if options.rescore:
        done: Iterable[str] = _answered(folder, benches)
    else:
        check_model(checkpoint)  # quick, while the data may be a download
        done = _generate(options, checkpoint, folder, benches or [DEFAULT], data)
    scores = {bench: write_scores(folder, bench, model=options.model, step=checkpoint.step) for bench in done}
    if scores:  # rank 0 alone has some
        show(score_table(scores))
        show(f"responses and scores: {folder}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="vtfast eval",
        usage="vtfast eval [-h] --model MODEL [--bench NAME,...] [--FLAG VALUE ...]",
        description="Ask a model the questions of spatial benchmarks, greedily, and score the answers.\n"
        "Responses are kept: the same call continues where it was stopped.",
        epilog=EXAMPLES,
        formatter_class=_WithExamples,
        hints={bench: f"several benchmarks take commas, --bench {','.join(BENCHMARKS)}" for bench in BENCHMARKS},
        checks={
            **dict.fromkeys(
                ("limit", "max_completion_length", "batch_size", "min_pixels", "max_pixels"), whole_number(1)
            ),
            "literal_image": one_of("true", "false"),
            "dtype": one_of("auto", "float32", "bfloat16"),
            "device": one_of("auto", "cpu", "cuda"),
        },
    )
    add = parser.add_argument_group("questions").add_argument
    add("--model", required=True, help="a run folder or its checkpoint, a model folder or a hub id")
    add("--bench", metavar="NAME,...", help=f"any of {', '.join(BENCHMARKS)} (default {DEFAULT})")
    add(
        "--data",
        action="append",
        metavar="BENCH=PATH",
        help="a file, a folder or another hub id for a benchmark; several with commas (default: the hub)",
    )
    add("--limit", metavar="N", help="only the first N questions of each (default: all)")
    add("--image_folder", metavar="FOLDER", help="where VSR's images are (default: beside its file)")
    add("--fetch_images", action="store_true", help="download VSR's missing images from COCO's links")
    add = parser.add_argument_group("prompts and generation").add_argument
    add(
        "--template",
        metavar="NAME|FILE",
        help="prompt: a name in vtfast/data/templates, or a text file (default: by how the model was trained:"
        " eval-r1-zero, eval-instruct, or these with -direct)",
    )
    add(
        "--literal_image",
        metavar="true|false",
        help="write the text <image> as the study's prompts do (default: as the run did, else false)",
    )
    add("--max_completion_length", default=1024, metavar="N", help="tokens (default 1024)")
    for name in ("--min_pixels", "--max_pixels"):
        add(name, metavar="N", help="of an image (default: the run's, else the checkpoint's)")
    add = parser.add_argument_group("execution").add_argument
    add("--batch_size", default=64, metavar="N", help="questions that a rank generates for at once (default 64)")
    add("--dtype", default="auto", metavar="X", help="float32 or bfloat16 (default auto, by device)")
    add("--device", default="auto", metavar="X", help="cpu or cuda (default auto: CUDA if there is any)")
    add(
        "--output_dir",
        metavar="FOLDER",
        help="results go to FOLDER/evaluations/NAME (default: the run, else the current folder)",
    )
    add("--rescore", action="store_true", help="score existing responses again; needs no model and no data")
    add("--local_rank", help=argparse.SUPPRESS)  # launchers pass it
    return parser


def _names(bench: str | None) -> list[str]:
    """The benchmarks of `--bench`; none without the flag."""
    return list(dict.fromkeys(filter(None, map(str.strip, (bench or "").split(",")))))


def _pairs(data: Sequence[str] | None) -> list[str]:
    """The BENCH=PATH of `--data`."""
    return [pair for text in data or [] for pair in text.split(",")]


def _problems(options: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the command line, without loading anything."""
    names = _names(options.bench)
    unknown = [name for name in names if name not in BENCHMARKS]
    benches = [name for name in names if name in BENCHMARKS]
    asked = benches or [DEFAULT]
    if options.bench is not None and not names:
        yield f"--bench: name at least one of {', '.join(BENCHMARKS)}"
    for name in unknown:
        close = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {close[0]}? There" if close else "there"
        yield f"--bench {name}: unknown; {hint} are {', '.join(BENCHMARKS)}"
    for pair in _pairs(options.data):
        bench, equals, path = pair.partition("=")
        if not path or bench not in BENCHMARKS:
            such = f"{asked[0]}={'FOLDER' if equals or pair in BENCHMARKS else pair}"
            yield f"--data {pair}: expected BENCH=PATH, such as --data {such}, with BENCH one of {', '.join(asked)}"
        elif bench not in asked and not unknown:
            yield f"--data {pair}: {bench} is not among the benchmarks; add it with --bench {','.join([*asked, bench])}"
    if options.template is not None:
        yield from _message_of(load_template, options.template, f"--template {options.template}: ")
    low, high = options.min_pixels, options.max_pixels
    if low and high and low > high:
        yield f"--min_pixels {low}: must be at most --max_pixels {high}"
    if options.output_dir is not None:
        home = expand(options.output_dir)
        for folder in (home, *home.parents):
            if folder.is_file():
                what = "" if folder == home else f"{folder} "
                yield f"--output_dir {options.output_dir}: {what}is a file; name a folder"
    if options.rescore:
        return
    for flag in ("image_folder", "fetch_images"):
        if getattr(options, flag) and "vsr" not in benches:
            yield f"--{flag}: has an effect only with --bench vsr"
    if options.image_folder is not None and not expand(options.image_folder).is_dir():
        folder = options.image_folder
        yield f"--image_folder {folder}: no such folder; {did_you_mean(folder, 'name one')}"
    if options.model:
        model = expand(options.model)
        if not model.is_dir() and not (model.name == "last" and model.parent.is_dir()):  # `find_model` resolves `last`
            yield from _message_of(model_path, options.model, f"--model {options.model}: ")


def _message_of(function: Callable[..., object], argument: str, flag: str) -> Iterator[str]:
    """The flag with the UserError of `function(argument)`, if it raises one."""
    try:
        function(argument)
    except UserError as error:
        yield f"{flag}{error}"


def _answered(folder: Path, benches: Sequence[str]) -> list[str]:
    """The benchmarks whose responses are to be scored again."""
    answered = [bench for bench in BENCHMARKS if (folder / f"{bench}.jsonl").is_file()]
    missing = [bench for bench in benches if bench not in answered]
    if missing or not answered:
        raise UserError(f"--rescore: there is no {(missing or ['BENCH'])[0]}.jsonl in {folder}; run without --rescore")
    return list(benches) or answered


def _generate(
    options: argparse.Namespace,
    checkpoint: EvaluatedModel,
    folder: Path,
    benches: Sequence[str],
    data: Mapping[str, str],
) -> Iterator[str]:
    """Generates the responses; yields each finished benchmark, on rank 0 only."""
    import torch
    from transformers.utils import logging as transformers_logging

    from vtfast.config import Config
    from vtfast.data.processor import Processor
    from vtfast.distributed import init
    from vtfast.evaluate import evaluate
    from vtfast.evaluate.benchmark_files import find_benchmark_files
    from vtfast.evaluate.resolve_model import default_template
    from vtfast.model.loading import load_model

    sources = {bench: data.get(bench, BENCHMARKS[bench].hub_id) for bench in benches}
    problems: list[str] = []  # all of them, before a model is loaded
    for bench in benches:
        flag = f"--data {bench}={data[bench]}: " if bench in data else ""
        problems += _message_of(partial(find_benchmark_files, BENCHMARKS[bench]), sources[bench], flag)
    if options.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: PyTorch sees no CUDA device; use --device cpu or auto")
    if problems:
        raise SettingsError(problems)
    transformers_logging.disable_progress_bar()
    ranks = init.init_distributed(Config(device=options.device))
    config = checkpoint.config
    processor = Processor.from_pretrained(
        checkpoint.path,
        min_pixels=options.min_pixels or config.get("min_pixels"),
        max_pixels=options.max_pixels or config.get("max_pixels"),
    )
    policy = load_model(checkpoint.path, options.dtype, str(ranks.device))
    literal = options.literal_image or str(config.get("literal_image", False)).lower()
    trained_with = config.get("template")
    template = options.template or default_template(checkpoint, processor.tokenizer.chat_template)
    aside = f" (the run trained with {trained_with})" if trained_with not in (None, template) else ""
    log.info("prompts use the template %s%s", template, aside)
    for bench in benches:
        evaluate(
            policy,
            bench,
            sources[bench],
            options.limit,
            processor=processor,
            template=template,
            literal_image=literal == "true",
            max_completion_length=options.max_completion_length,
            batch_size=options.batch_size,
            output=folder,
            image_folder=options.image_folder,
            fetch_images=options.fetch_images,
            ranks=ranks,
        )
        if ranks.is_main:
            yield bench
