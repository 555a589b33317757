"""Ask a policy every question of a benchmark, greedily, and score its responses."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from vtfast.data import Sample
from vtfast.data.images import Images, check_image
from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.data.prompt_templates import load_template, render
from vtfast.distributed import watchdog
from vtfast.distributed.ranks import Ranks
from vtfast.evaluate import vsr_images
from vtfast.evaluate.benchmark import Benchmark, Example
from vtfast.evaluate.benchmark_files import load_examples
from vtfast.evaluate.benchmarks import get_benchmark
from vtfast.evaluate.response_file import ResponseFile, Row, make_row
from vtfast.evaluate.scores import score_rows
from vtfast.model.policy import Policy
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.utils.errors import UserError, error_prefix
from vtfast.utils.files import expand

TEMPLATE = "eval-r1-zero"
MAX_COMPLETION_LENGTH = 1024
BATCH_SIZE = 64
T = TypeVar("T")


@watchdog.no_progress_expected("loading the questions")
def evaluate(
    policy: Policy,
    bench: str = "cvbench",
    data: str | Path | None = None,
    limit: int | None = None,
    *,
    processor: Processor | None = None,
    template: str | Path = TEMPLATE,
    literal_image: bool = False,
    max_completion_length: int = MAX_COMPLETION_LENGTH,
    batch_size: int = BATCH_SIZE,
    output: str | Path | None = None,
    image_folder: str | Path | None = None,
    fetch_images: bool = False,
    ranks: Ranks | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores of a policy on a benchmark, as `vtfast.evaluate.score` describes them.

    Args:
        data: a file, a folder in the data set's layout, or a hub id; None: the benchmark's own hub id.
        limit: ask only the first `limit` questions.
        processor: for text and images; None: that of the checkpoint that the policy was loaded from.
        template: a name in vtfast/data/templates, or the path of a text file.
        literal_image: fill the template's slot for the text `<image>`, which the study's prompts have by an oversight.
        batch_size: questions that a rank generates for at once.
        output: folder that keeps the responses. Those that it already holds are not generated again, and are scored.
        image_folder: where VSR's images are; fetch_images: download the missing ones.
        ranks: processes that share the questions; each must call this. None: this process alone.

    Raises:
        UserError: bad input, on all ranks.
    """
    benchmark = get_benchmark(bench)
    for name, value in (("limit", limit), ("batch_size", batch_size), ("max_completion_length", max_completion_length)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    ranks = ranks or Ranks(0, 1, policy.device)
    processor = processor or Processor.from_pretrained(policy.module.name_or_path)
    runner = BenchmarkRunner(benchmark, policy, processor, str(template), literal_image, max_completion_length)
    examples = list(itertools.islice(load_examples(benchmark, data), limit))
    if not examples:
        raise UserError(f"{data or benchmark.hub_id}: has no questions of {benchmark.title}")
    if bench == "vsr":
        examples = _with_images(examples, image_folder, fetch_images, ranks)
    responses = ResponseFile()
    if output is not None:
        folder, settings = Path(output), runner.settings()
        responses = ranks.on_main(lambda: ResponseFile.open(folder, bench, settings))
    _respond(runner, examples, responses, batch_size, ranks, progress and ranks.is_main)
    return score_rows(bench, responses.rows)


def _with_images(
    examples: list[Example], image_folder: str | Path | None, fetch_images: bool, ranks: Ranks
) -> list[Example]:
    folder = None if image_folder is None else expand(image_folder)
    if fetch_images:
        ranks.on_main(lambda: vsr_images.fetch(examples, folder))
    return vsr_images.locate(examples, folder)


def _respond(
    runner: BenchmarkRunner,
    examples: Sequence[Example],
    responses: ResponseFile,
    batch_size: int,
    ranks: Ranks,
    show_progress: bool,
) -> None:
    """Add the responses to the examples that have none yet."""
    bench = runner.benchmark.name
    unanswered = responses.unanswered(examples)
    ranks.gather_rows(partial(_check_images, unanswered[ranks.rank :: ranks.size]))
    done = len(examples) - len(unanswered)
    bar = tqdm(total=len(examples), initial=done, desc=bench, unit="question", disable=not show_progress)
    watchdog.beat(bench)
    with bar:
        for batch in _batches(unanswered, batch_size, ranks, runner.encode):
            rows = ranks.gather_rows(partial(runner.respond, batch, show_progress))
            responses.add(rows, write=ranks.is_main)
            bar.update(len(rows))


def _check_images(examples: Sequence[Example]) -> list[Row]:
    """Raises UserError for an image that does not decode, before the first response is generated; returns no rows."""

    def check(example: Example) -> None:
        with error_prefix(example.where):
            for image in example.images:
                check_image(image)

    with ThreadPoolExecutor(max_workers=8) as pool:  # decoders release the interpreter lock
        list(pool.map(check, examples))
    return []


def exact_weights_digest(policy: Policy) -> str:
    """Hash of the weights in memory: of every parameter's name, shape, dtype and the sum of its bits."""
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in sorted(policy.module.named_parameters()):
        bits = {2: torch.int16, 4: torch.int32}[parameter.element_size()]
        total = int(parameter.detach().view(bits).sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total}\n".encode())
    return digest.hexdigest()


class BenchmarkRunner:
    """Examples -> prompts -> rows with the policy's greedy responses."""

    def __init__(
        self,
        benchmark: Benchmark,
        policy: Policy,
        processor: Processor,
        template: str,
        literal_image: bool,
        max_new_tokens: int,
    ) -> None:
        self.benchmark = benchmark
        self.processor, self.literal_image = processor, literal_image
        self.template, self.text = template, load_template(template)
        # The checkpoint's end tokens, or the tokenizer's where its generation_config names none.
        self.policy = dataclasses.replace(policy, eos_ids=tuple(processor.eos_ids))
        self.engine = RolloutEngine(self.policy)
        self.sampling = Sampling(max_new_tokens=max_new_tokens, greedy=True)

    def settings(self) -> dict[str, Any]:
        """What the responses depend on besides the questions."""
        low, high = self.processor.pixel_limits or (None, None)
        return {
            "model": exact_weights_digest(self.policy),
            "template": self.template,
            "prompt": self.text,
            "literal_image": self.literal_image,
            "min_pixels": low,
            "max_pixels": high,
            "max_completion_length": self.sampling.max_new_tokens,
            "eos_ids": list(self.policy.eos_ids),
        }

    def encode(self, examples: Sequence[Example]) -> list[tuple[Example, Prompt]]:
        return [(example, self._prompt(example)) for example in examples]

    def _prompt(self, example: Example) -> Prompt:
        options = list(example.options)
        sample = Sample(example.question, options, options[example.gold], Images(example.images), example.task)
        text = render(self.text, sample, literal_image=self.literal_image)
        with error_prefix(example.where):
            return self.processor.encode(text, sample.images)

    def respond(self, batch: Future[list[tuple[Example, Prompt]]], progress: bool) -> list[Row]:
        examples = batch.result()
        prompts = [prompt for _, prompt in examples]
        completions = self.engine.generate(prompts, 1, self.sampling, progress=progress)
        rows = []
        for (example, _), (completion,) in zip(examples, completions, strict=True):
            response = self.processor.decode(completion.tokens)
            rows.append(make_row(self.benchmark, example, response, len(completion.tokens), completion.finish_reason))
        return rows


def _batches(
    examples: Sequence[Example], per_rank: int, ranks: Ranks, encode: Callable[[Sequence[Example]], T]
) -> Iterator[Future[T]]:
    """This rank's share of each batch, encoded; the next one is encoded while the caller works on this one."""
    size = per_rank * ranks.size
    shares = [examples[start : start + size][ranks.rank :: ranks.size] for start in range(0, len(examples), size)]
    with ThreadPoolExecutor(max_workers=1) as pool:
        encoded = (pool.submit(encode, share) for share in shares)
        batch = next(encoded, None)
        while batch is not None:
            upcoming = next(encoded, None)
            yield batch
            batch = upcoming
