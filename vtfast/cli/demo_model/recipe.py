"""Makes the tiny base model of the demo, which reads images well and often answers wrongly.

There are two supervised phases. The warm-up trains on correct questions and, fading out, captions. The weak phase adds
the weakness that GRPO then removes: the trace before `</think>` stays right, but the answer after it is often hasty
(`Question.hasty`), and less than half of the completions keep the format. The weakness is deliberate.

Steps and seed are fixed, and one machine makes the same weights every time.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration

from vtfast.cli.demo_model.training import IMAGE_TOKENS, CellReader, Example, Muon, complete, completion_loss, scores
from vtfast.data.prompt_templates import IMAGE
from vtfast.data.synthetic import COLUMNS, ROWS, Question, Scene, sample_question, sample_questions, sample_scene
from vtfast.model.tiny_model import (
    SPECIAL_IDS,
    build_tokenizer,
    completion_text,
    prompt_text,
    random_model,
    write_folder,
)

BATCH = 48
RAMP = 20  # steps over which the learning rate rises
ADAM_LR = 3e-3  # for the embedding and everything that is not a matrix
WARMUP_STEPS, WARMUP_LR = 1800, 1e-2
WEAK_STEPS, WEAK_LR = 250, 1.5e-3
KEEPS_FORMAT = 0.45
MIX = ("relation", "count", "depth", "distance", "count", "distance")
EVAL_SEED, EVAL_QUESTIONS, EVAL_BATCH, EVAL_SAMPLES = 777, 800, 200, 2
THREADS = 1  # the weights depend on their number
PROPERTIES = {
    "column": lambda thing: COLUMNS[thing.column],
    "row": lambda thing: ROWS[thing.row],
    "size": lambda thing: thing.size,
}
CAPTION_WEIGHTS = (2, 3, 3, 1)  # columns and rows are the hardest to learn
END, PAD = "<|endoftext|>", "<|image_pad|>"
MALFORMED = (  # what a base model writes instead; a reward can read an answer from none of them
    "{trace}</think>{answer}",
    "{trace}</think><answer>{answer}",
    "{trace}</think>{answer}</answer>",
    "{trace} so {answer}",
)


def make_base(
    path: str | Path,
    *,
    seed: int = 0,
    warmup_steps: int = WARMUP_STEPS,
    weak_steps: int = WEAK_STEPS,
    questions: int = EVAL_QUESTIONS,
    progress: bool = True,
) -> Path:
    """Train the base model and write its folder, with `recipe.json`, to `path`; returns it.

    About 10 minutes with the default steps. The weights depend on the arguments, the machine and
    the library versions only; `questions` is the number of held-out questions it is evaluated on, 0 for none.
    `path` must be new or an empty folder.
    """
    path = Path(path)
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        model, tokenizer = random_model(seed), build_tokenizer()
        warm_up(model, tokenizer, seed=seed, steps=warmup_steps, progress=progress)
        weaken(model, tokenizer, seed=seed, steps=weak_steps, progress=progress)
        measured = measure(model, tokenizer, questions) if questions else {}
    finally:
        torch.set_num_threads(before)
    recipe = {
        "made_by": "vtfast make-base",
        "seed": seed,
        "warmup_steps": warmup_steps,
        "weak_steps": weak_steps,
        "threads": THREADS,
        "torch": torch.__version__.split("+")[0],
        "questions": questions,
        "measured": measured,
    }
    write_folder(path, model, recipe=recipe)
    return path


def warm_up(
    model: Qwen2VLForConditionalGeneration, tokenizer: Tokenizer, *, seed: int, steps: int, progress: bool = True
) -> None:
    """Clean supervision; half of it captions, fading out over the second half.

    A `CellReader` helps to train the vision encoder and is discarded.
    """
    rng = random.Random(f"warm-up-{seed}")

    def batch(step: int) -> list[Example]:
        captions = 0.5 * min(1.0, 2 * (1 - step / steps))
        return [
            caption_example(tokenizer, rng)
            if rng.random() < captions
            else question_example(tokenizer, sample_question(rng, kind=MIX[i % len(MIX)]), rng)
            for i in range(BATCH)
        ]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = CellReader(model.config.text_config.hidden_size)
    _train(model, batch, steps, WARMUP_LR, "warm-up", progress, reader)


def weaken(
    model: Qwen2VLForConditionalGeneration, tokenizer: Tokenizer, *, seed: int, steps: int, progress: bool = True
) -> None:
    """Train on hasty answers and a broken format; the traces stay right."""
    rng = random.Random(f"weak-{seed}")

    def batch(step: int) -> list[Example]:
        return [
            question_example(tokenizer, sample_question(rng, kind=MIX[i % len(MIX)]), rng, weak=True)
            for i in range(BATCH)
        ]

    _train(model, batch, steps, WEAK_LR, "weak phase", progress)


def _train(
    model: Qwen2VLForConditionalGeneration,
    batch: Callable[[int], list[Example]],
    steps: int,
    lr: float,
    name: str,
    progress: bool,
    reader: CellReader | None = None,
) -> None:
    """Muon at `lr` for the layers' matrices, AdamW for the rest; both rise, then fall to a tenth."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "head" not in n]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    others += reader.parameters() if reader else []
    adam_lr = ADAM_LR * lr / WARMUP_LR
    optimizers = [Muon(matrices, lr), torch.optim.AdamW(others, adam_lr, weight_decay=0.0)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, steps)) for o in optimizers]
    model.train()
    with tqdm(range(steps), desc=name, disable=not progress) as bar:
        for step in bar:
            loss = completion_loss(model, batch(step), SPECIAL_IDS[END], reader)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def _rate(step: int, steps: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / RAMP) * (0.1 + 0.9 * cosine)


def question_example(tokenizer: Tokenizer, question: Question, rng: random.Random, *, weak: bool = False) -> Example:
    """A question with its correct completion, or with `weak` one that the base model should learn."""
    text = completion_text(question.trace, question.answer)
    if weak:
        hasty = rng.random() < question.hasty_rate
        answer = question.hasty if hasty else question.answer
        text = completion_text(question.trace, answer)
        if rng.random() >= KEEPS_FORMAT:
            text = rng.choice(MALFORMED).format(trace=question.trace, answer=answer)
    return _example(tokenizer, question.scene, prompt_text(question, rng), text)


def caption_example(tokenizer: Tokenizer, rng: random.Random) -> Example:
    """One property of each object of a scene, or their names in raster order.

    The request gives the order, so that every word of the caption is determined.
    """
    scene = sample_scene(rng)
    asked = rng.choices(("object", *PROPERTIES), CAPTION_WEIGHTS)[0]
    if asked == "object":
        request = "List each object."
        text = ", ".join(t.name for t in scene.things)
    else:
        things = rng.sample(scene.things, len(scene.things))
        request = f"List the {asked} of {', '.join(t.colour for t in things)}."
        text = ", ".join(f"{t.colour} {PROPERTIES[asked](t)}" for t in things)
    prompt = f"{IMAGE}User: {request}\nAssistant: <think>"
    return _example(tokenizer, scene, prompt, f"{text}</think>")


def _example(tokenizer: Tokenizer, scene: Scene, prompt: str, completion: str) -> Example:
    # Prompt and completion are tokenised apart, as they are when the model is sampled.
    return Example(scene, prompt_ids(tokenizer, prompt), [*tokenizer.encode(completion).ids, SPECIAL_IDS[END]])


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt with one image, its placeholder repeated for the nine image tokens."""
    return tokenizer.encode(prompt.replace(PAD, PAD * IMAGE_TOKENS)).ids


def measure(
    model: Qwen2VLForConditionalGeneration, tokenizer: Tokenizer, questions: int
) -> dict[str, dict[str, dict[str, float]]]:
    """{"greedy" | "sampled": scores} on validation scenes, which are not trained on."""
    asked = sample_questions(questions, split="val", seed=EVAL_SEED)
    rng = random.Random(EVAL_SEED)
    prompts = [prompt_ids(tokenizer, prompt_text(q, rng)) for q in asked]

    def answer(samples: int, generator: torch.Generator | None) -> dict[str, dict[str, float]]:
        answered: list[Question] = []
        texts: list[str] = []
        for start in range(0, questions, EVAL_BATCH):
            part = slice(start, start + EVAL_BATCH)
            batch = asked[part] * samples
            scenes = [question.scene for question in batch]
            ids = complete(model, scenes, prompts[part] * samples, eos=SPECIAL_IDS[END], generator=generator)
            answered += batch
            texts += [tokenizer.decode(row, skip_special_tokens=False) for row in ids]
        return scores(answered, texts)

    generator = torch.Generator().manual_seed(EVAL_SEED)
    return {"greedy": answer(1, None), "sampled": answer(EVAL_SAMPLES, generator)}
