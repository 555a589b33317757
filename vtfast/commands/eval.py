"""`vtfast eval`."""

from __future__ import annotations

import argparse
import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

from vtfast.commands.parser import Parser
from vtfast.errors import UserError
from vtfast.files import check_inside, expand
from vtfast.terminal import show

log = logging.getLogger("vtfast")
BENCHES = ("cvbench", "blink", "vsr", "sat")
"""Those of `vtfast.evaluate`, whose import takes seconds; a test compares the two."""
EXAMPLES = """examples:
  vtfast eval --model runs/x/checkpoints/last --bench cvbench,blink
  vtfast eval --model Qwen/Qwen2-VL-2B --bench vsr --data vsr=/data/test.jsonl --image_folder /data/coco
  torchrun --nproc_per_node 8 --no-python vtfast eval --model runs/x/checkpoints/last
"""


def run(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)

    from vtfast.evaluate.answers import write_scores
    from vtfast.evaluate.checkpoints import find_checkpoint
    from vtfast.evaluate.table import score_table

    checkpoint = find_checkpoint(options.model)
    home = expand(options.output_dir) if options.output_dir else checkpoint.home
    folder = home / "evaluations" / checkpoint.name
    check_inside(home, *(folder / f"{bench}.jsonl" for bench in BENCHES))
    scores = {}
    for bench in (
        _rescore(options, folder) if options.rescore else _ask(options, checkpoint, folder)
    ):
        scores[bench] = write_scores(folder, bench, model=options.model, step=checkpoint.step)
    if scores:  # rank 0 alone has some
        show(score_table(scores))
        show(f"answers and scores: {folder}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="vtfast eval",
        description="Ask a model the questions of spatial benchmarks, greedily, and score the answers.\n"
        "What was answered before is kept: the same call goes on where it was stopped.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="checkpoint of a run, a run folder, a model folder or a hub id",
    )
    add("--bench", help=f"any of {', '.join(BENCHES)}, with commas (default cvbench)")
    add(
        "--data", action="append", default=[], metavar="BENCH=PATH",
        help="a local file or folder, or another hub id, for a benchmark; several with commas (default: the hub)",
    )  # fmt: skip
    add("--limit", type=int, metavar="N", help="ask the first N questions of each only")
    add(
        "--template",
        help="prompt: a name in vtfast/templates or the path of a text file. Default: eval-r1-zero for base models and"
        " eval-instruct for instruction-tuned ones, with -direct if the run trained without <think>",
    )
    add(
        "--literal_image", choices=("true", "false"),
        help="write the text <image> as the study's prompts do (default: as the run did, else false)",
    )  # fmt: skip
    add(
        "--max_completion_length", type=int, default=1024, metavar="N", help="tokens (default 1024)"
    )
    add("--min_pixels", type=int, metavar="N", help="default: the run's, else the checkpoint's")
    add("--max_pixels", type=int, metavar="N", help="default: the run's, else the checkpoint's")
    add("--image_folder", metavar="FOLDER", help="where VSR's images are")
    add("--fetch_images", action="store_true", help="fetch VSR's missing images from COCO's links")
    add(
        "--batch_size",
        type=int,
        default=64,
        metavar="N",
        help="questions that a rank answers together",
    )
    add(
        "--output_dir",
        metavar="FOLDER",
        help="results go to FOLDER/evaluations/NAME (default: the run, else here)",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on CUDA",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda where there is one",
    )
    add(
        "--rescore",
        action="store_true",
        help="score the answers that are there; needs no model and no data",
    )
    add("--local_rank", help=argparse.SUPPRESS)  # launchers pass it
    return parser


def _rescore(options: argparse.Namespace, folder: Path) -> list[str]:
    """The benchmarks whose answers are to be scored again."""
    there = [bench for bench in BENCHES if (folder / f"{bench}.jsonl").is_file()]
    benches = _benches(options.bench) if options.bench else there
    missing = [bench for bench in benches if bench not in there]
    if missing or not benches:
        raise UserError(f"--rescore: there is no {(missing or ['BENCH'])[0]}.jsonl in {folder}")
    return benches


def _ask(options: argparse.Namespace, checkpoint, folder: Path):
    """Yields, on rank 0, each benchmark whose questions have been answered."""
    from transformers.utils import logging as transformers_logging

    from vtfast import distributed
    from vtfast.config import Config
    from vtfast.evaluate import BENCHMARKS, evaluate
    from vtfast.evaluate.checkpoints import default_template
    from vtfast.evaluate.files import find_files
    from vtfast.model import load_model
    from vtfast.processor import Processor

    benches = _benches(options.bench or "cvbench")
    sources = _sources(options.data, benches)
    for bench in benches:  # a wrong path is told before a model is loaded
        find_files(BENCHMARKS[bench], sources[bench])
    transformers_logging.disable_progress_bar()
    ranks = distributed.start(Config(device=options.device))
    config = checkpoint.config
    limits = {
        name: config.get(name) if getattr(options, name) is None else getattr(options, name)
        for name in ("min_pixels", "max_pixels")
    }
    processor = Processor.from_pretrained(checkpoint.path, **limits)
    policy = load_model(checkpoint.path, options.dtype, str(ranks.device))
    literal, trained_with = config.get("literal_image", False), config.get("template")
    template = options.template or default_template(checkpoint, processor.tokenizer.chat_template)
    aside = (
        f" (the run trained with {trained_with})" if trained_with not in (None, template) else ""
    )
    log.info("asked with the template %s%s", template, aside)
    for bench in benches:
        evaluate(
            policy,
            bench,
            sources[bench],
            options.limit,
            processor=processor,
            template=template,
            literal_image=literal
            if options.literal_image is None
            else options.literal_image == "true",
            max_completion_length=options.max_completion_length,
            batch_size=options.batch_size,
            output=folder,
            image_folder=options.image_folder,
            fetch_images=options.fetch_images,
            ranks=ranks,
        )
        if ranks.is_main:
            yield bench


def _benches(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in BENCHES:
            close = difflib.get_close_matches(name, BENCHES, n=1, cutoff=0.0)
            raise UserError(
                f"--bench {name}: unknown; did you mean {close[0]}? There are {', '.join(BENCHES)}"
            )
    if not names:
        raise UserError(f"--bench: name at least one of {', '.join(BENCHES)}")
    return names


def _sources(given: Sequence[str], benches: Sequence[str]) -> dict[str, str]:
    """`cvbench=PATH,blink=PATH` -> path or hub id by benchmark; the published data set where nothing is given."""
    from vtfast.evaluate import BENCHMARKS

    sources = {bench: BENCHMARKS[bench].hub_id for bench in benches}
    for pair in [pair for text in given for pair in text.split(",")]:
        bench, equals, path = pair.partition("=")
        if not equals or not path or bench not in benches:
            raise UserError(
                f"--data {pair}: BENCH=PATH is wanted, such as {benches[0]}=FOLDER, with BENCH one of"
                f" {', '.join(benches)}"
            )
        sources[bench] = path
    return sources
