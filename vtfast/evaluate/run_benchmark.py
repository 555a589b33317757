"""Ask a policy every question of a benchmark, greedily, and score what it says."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from vtfast.data import Sample
from vtfast.data.images import ImageError, Images, check_image
from vtfast.data.processor import Processor
from vtfast.data.prompt import Prompt
from vtfast.data.prompt_templates import load_template, render
from vtfast.distributed import watchdog
from vtfast.distributed.ranks import Ranks
from vtfast.evaluate import vsr_images
from vtfast.evaluate.benchmark import Benchmark, Example
from vtfast.evaluate.benchmark_files import load_examples
from vtfast.evaluate.response_file import ResponseFile, Row, make_row, scores_of
from vtfast.evaluate.scores import get_benchmark
from vtfast.model.policy import Policy
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.utils.errors import UserError
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
        data: a file, a folder in the data set's layout, or a hub id; the benchmark's own hub id where None.
        limit: ask the first so many examples only.
        processor: for text and images; of the checkpoint that the policy was loaded from where None.
        template: a name in vtfast/data/templates, or the path of a text file.
        literal_image: fill the template's slot for the text `<image>`, which the study's prompts have by an oversight.
        batch_size: questions that a rank answers together.
        output: folder that keeps the answers. What it already holds is not asked again, and is part of the scores.
        image_folder: where VSR's images are; fetch_images: fetch those that are nowhere.
        ranks: processes that share the questions; each must call this. Alone where None.

    Raises:
        UserError: bad input, on all ranks.
    """
    benchmark = get_benchmark(bench)
    for name, value in (("limit", limit), ("batch_size", batch_size), ("max_completion_length", max_completion_length)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    ranks = ranks or Ranks(0, 1, policy.device)
    processor = processor or Processor.from_pretrained(policy.module.name_or_path)
    asker = _Asker(policy, processor, str(template), literal_image, max_completion_length)
    examples = list(itertools.islice(load_examples(benchmark, data), limit))
    if not examples:
        raise UserError(f"{data or benchmark.hub_id}: has no questions of {benchmark.title}")
    if bench == "vsr":
        folder = None if image_folder is None else expand(image_folder)
        if fetch_images:
            ranks.on_main(lambda: vsr_images.fetch(examples, folder))
        examples = vsr_images.locate(examples, folder)
    if output is None:
        answers = ResponseFile()
    else:
        settings = asker.settings()
        answers = ranks.on_main(lambda: ResponseFile.open(Path(output), bench, settings))

    left = answers.left(examples)
    ranks.gather_rows(lambda: _check_images(left[ranks.rank :: ranks.size]))
    show = progress and ranks.is_main
    bar = tqdm(total=len(examples), initial=len(examples) - len(left), desc=bench, unit="question", disable=not show)
    watchdog.beat(bench)
    with bar:
        for encoded in _batches(left, batch_size, ranks, asker.encode):
            rows = ranks.gather_rows(lambda batch=encoded: asker.answer(benchmark, batch.result(), show))
            answers.add(rows, write=ranks.is_main)
            bar.update(len(rows))
    return scores_of(bench, answers.rows)


def _check_images(examples: Sequence[Example]) -> list[Row]:
    """No rows: raises UserError for an image that does not decode, before the first question is asked."""

    def problem(example: Example) -> str | None:
        try:
            for image in example.images:
                check_image(image)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max_workers=8) as pool:  # decoders leave the interpreter lock alone
        for example, found in zip(examples, pool.map(problem, examples), strict=True):
            if found:
                raise UserError(f"{example.where}: {found}")
    return []


def fingerprint(policy: Policy) -> str:
    """Tells two sets of weights apart: a hash over every parameter's name, shape, dtype and the sum of its bits.

    It is of the weights as they are in memory; where they were loaded from does not count.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in sorted(policy.module.named_parameters()):
        bits = {2: torch.int16, 4: torch.int32}[parameter.element_size()]
        total = int(parameter.detach().view(bits).sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total}\n".encode())
    return digest.hexdigest()


class _Asker:
    """Items -> prompts -> rows with the policy's greedy answers."""

    def __init__(
        self, policy: Policy, processor: Processor, template: str, literal_image: bool, max_new_tokens: int
    ) -> None:
        self.processor, self.literal_image = processor, literal_image
        self.template, self.text = template, load_template(template)
        # The checkpoint's end tokens, or the tokenizer's where its generation_config names none.
        self.policy = dataclasses.replace(policy, eos_ids=tuple(processor.eos_ids))
        self.engine = RolloutEngine(self.policy)
        self.sampling = Sampling(max_new_tokens=max_new_tokens, greedy=True)

    def settings(self) -> dict[str, Any]:
        """What answers depend on besides the questions."""
        low, high = self.processor.pixel_limits or (None, None)
        return {
            "model": fingerprint(self.policy),
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
        try:
            return self.processor.encode(text, sample.images)
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from error

    def answer(self, benchmark: Benchmark, batch: Sequence[tuple[Example, Prompt]], progress: bool) -> list[Row]:
        prompts = [prompt for _, prompt in batch]
        completions = self.engine.generate(prompts, 1, self.sampling, progress=progress)
        return [
            make_row(
                benchmark,
                example,
                self.processor.decode(completion.tokens),
                len(completion.tokens),
                completion.finish_reason,
            )
            for (example, _), (completion,) in zip(batch, completions, strict=True)
        ]


def _batches(
    examples: Sequence[Example], per_rank: int, ranks: Ranks, encode: Callable[[Sequence[Example]], T]
) -> Iterator[Future[T]]:
    """This rank's share of each batch, encoded; the next one is encoded while the caller works on this one."""
    size = per_rank * ranks.size
    shares = [examples[start : start + size][ranks.rank :: ranks.size] for start in range(0, len(examples), size)]
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = [pool.submit(encode, share) for share in shares[:1]]
        for share in [*shares[1:], None]:
            if not upcoming:
                return
            current = upcoming.pop()
            if share is not None:
                upcoming = [pool.submit(encode, share)]
            yield current
