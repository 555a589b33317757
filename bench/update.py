"""`python -m bench update`: a GRPO update (forward, backward, AdamW step), compared with TRL and plain Hugging Face.

All contestants have the same weights and train on the same completions with the same advantages.
    ours           packed rows: every prompt and image once per group, no padding, fused head and loss
    checkpointed   ours, recomputing activations in the backward pass
    hf             plain Hugging Face code: padded, every prompt and image once per completion, whole logits
    trl            TRL's own GRPOTrainer._compute_loss, its fused head included, on the same padded batch
Before the timing the tests of packing and scoring must pass, and loss and gradient of each must be near those of plain
Hugging Face code in the next higher precision.
On a GPU: Qwen2-VL-2B's sizes with random weights, in bf16. Rows are appended to results/update.csv.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from vtfast_kernels.grpo_loss import GRPOLoss

from bench._harness import (
    GOALS_MISSED,
    NO_NUMBERS,
    absence,
    alternate,
    append,
    device_name,
    growth_in_child,
    measure_growth,
    paired_ratio,
    quantiles,
    tests_pass,
    versions,
)
from bench._workload import MID, SIZES, TWO_B, Shape, Workload
from vtfast.cost.devices import find_sheet
from vtfast.cost.micro_batches import GroupPart
from vtfast.data.prompt_builder import EncodedSample
from vtfast.model.attention import choose_backend
from vtfast.model.policy import Policy
from vtfast.rollout import Completion
from vtfast.training.groups import Group, MicroBatch
from vtfast.training.grpo_objective import GRPOObjective
from vtfast.training.metrics import update_flops

TESTS = ("model/test_packing.py", "model/test_scoring.py")
GOALS = {"hf": 1 / 2.5, "trl": 1 / 2}  # on the CPU, our time / theirs
MFU_GOAL = 0.4
GPU_GOALS = {200: 1 / 4, 700: 1 / 2.3}  # ours / TRL's by tokens of a completion


class Ours:
    def __init__(self, work: Workload) -> None:
        module = copy.deepcopy(work.module)
        backend = choose_backend("auto", work.device, work.dtype)
        self.policy = Policy(module, (0,), backend)
        if work.device == "cuda":
            from vtfast.model.liger import use_liger

            use_liger(self.policy)
        self.module = module
        self.objective = GRPOObjective(self.policy, GRPOLoss(beta=0.0))
        self.groups = {}
        for number, (prompt, answers) in enumerate(zip(work.prompts, work.tokens, strict=True)):
            completions = [Completion(answer, [0.0] * len(answer), "length") for answer in answers]
            question = EncodedSample(sample=None, prompt=prompt)
            self.groups[number] = Group(question, completions, advantage=work.advantage[number])
        self.sequences = sum(len(group) for group in work.tokens)
        self.tokens = sum(len(answer) for group in work.tokens for answer in group)

    def batch(self) -> MicroBatch:
        members = tuple(range(len(self.groups[0].completions)))
        parts = [GroupPart(number, members, 0, 0.0) for number in self.groups]
        return MicroBatch(parts, self.groups, self.policy)

    def losses(self) -> Iterator[Tensor]:
        """One per backward; their sum is the loss."""
        yield self.objective(self.batch(), self.sequences, self.tokens)[0]  # packing is part of every update


class Checkpointed(Ours):
    """Ours with gradient checkpointing: the cost and savings of the flag."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.module.gradient_checkpointing_enable({"use_reentrant": False})


class HuggingFace:
    def __init__(self, work: Workload) -> None:
        self.module, self.batches = work.clone(), work.batches()

    def losses(self) -> Iterator[Tensor]:
        for batch in self.batches:
            yield self.loss(batch) / len(self.batches)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        target = batch["completion_ids"]
        logits = self.module(
            input_ids=torch.cat([batch["prompt_ids"], target], 1),
            attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            pixel_values=batch["pixel_values"],
            image_grid_thw=batch["image_grid_thw"],
            mm_token_type_ids=batch["mm_token_type_ids"],
            logits_to_keep=target.shape[1] + 1,
        ).logits[:, :-1]
        logp = logits.float().log_softmax(-1).gather(-1, target[..., None])[..., 0]
        ratio = (logp - logp.detach()).exp()
        return -(ratio * batch["advantages"][:, None]).mean(1).mean()


class TRL:
    def __init__(self, work: Workload) -> None:
        from datasets import Dataset
        from transformers import PreTrainedTokenizerFast
        from trl import GRPOConfig, GRPOTrainer

        from vtfast.model.tiny_model import build_tokenizer

        rows = work.shape.G * len(work.prompts)
        self.folder = tempfile.TemporaryDirectory()
        arguments = GRPOConfig(
            output_dir=self.folder.name,
            per_device_train_batch_size=rows,
            num_generations=work.shape.G,
            max_completion_length=work.shape.completion,
            beta=0.0,
            loss_type="grpo",
            report_to=[],
            use_cpu=work.device == "cpu",
            bf16=False,  # on a GPU the weights already are bf16
            gradient_checkpointing=False,
            disable_dropout=True,
        )
        self.trainer = GRPOTrainer(
            model=work.clone(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "?"}] * rows),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=build_tokenizer(), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
            ),
        )
        self.module, self.batches = self.trainer.model.train(), work.batches()
        self.trainer.current_gradient_accumulation_steps = len(self.batches)

    def losses(self) -> Iterator[Tensor]:
        for batch in self.batches:
            yield self.trainer._compute_loss(self.module, batch)


CPU_SHAPES = [MID]
GPU_SHAPES = [replace(TWO_B, completion=tokens) for tokens in (200, 700)]
CONTESTANTS = {"ours": Ours, "checkpointed": Checkpointed, "hf": HuggingFace, "trl": TRL}


def updater(contestant: Ours | HuggingFace | TRL) -> Callable[[], Tensor]:
    """One optimizer step; every contestant gets the same fused AdamW."""
    trained = [p for p in contestant.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def run() -> Tensor:
        total = backward(contestant)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return run


def backward(contestant: Ours | HuggingFace | TRL) -> Tensor:
    """Compute the gradients -> the loss."""
    total = torch.zeros((), device=next(contestant.module.parameters()).device)
    for loss in contestant.losses():
        loss.backward()
        total += loss.detach()
    return total


class Gold(HuggingFace):
    """Plain Hugging Face code in the next higher precision: what all contestants are compared with."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.module.to(torch.float64 if work.dtype == torch.float32 else torch.float32)


def outcome(contestant: Ours | HuggingFace | TRL) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, in the weights' precision."""
    loss = float(backward(contestant))
    gradients = {name: p.grad for name, p in contestant.module.named_parameters() if p.grad is not None}
    contestant.module.zero_grad()
    return loss, gradients


def distance(contestant: Ours | HuggingFace | TRL, gold: tuple[float, dict[str, Tensor]]) -> tuple[float, float]:
    """From `gold`: |loss difference|, and the relative difference of the gradient, as one vector of all parameters. A
    single small parameter says little: some nearly cancel, and are mostly rounding in half precision."""
    loss, gradients = outcome(contestant)
    assert gradients.keys() == gold[1].keys()
    apart = sum(float((gradients[name].to(g.dtype) - g).norm() ** 2) for name, g in gold[1].items())
    whole = sum(float(g.norm() ** 2) for g in gold[1].values())
    return abs(loss - gold[0]), (apart / whole) ** 0.5


def grow(name: str, shape: Shape, threads: int) -> None:
    """Called in a child process: memory of a second update, when optimizer state and thread pools exist."""
    torch.set_num_threads(threads)
    run = updater(CONTESTANTS[name](Workload(shape, "cpu")))
    run()
    measure_growth(run)


def memory_growth(name: str, run: Callable[[], Tensor], work: Workload, threads: int) -> float:
    """Peak MB that an update adds."""
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - base) / 2**20
    return growth_in_child(
        f"from bench._workload import Shape; from bench.update import grow; grow({name!r}, {work.shape!r}, {threads})"
    )


def compare(shape: Shape, device: str, rounds: int, threads: int) -> bool:
    work = Workload(shape, device)
    players, runs, rows = {}, {}, []
    distances: dict[str, tuple[float, float]] = {}
    limits = (1e-5, 1e-3) if work.dtype == torch.float32 else (5e-2, 0.1)
    precision = "float64" if work.dtype == torch.float32 else "float32"
    gold = outcome(Gold(work))

    def remove(name: str, error: Exception) -> None:
        """Remove a peer that cannot run or does not fit into memory, so that the others are still measured."""
        if name == "ours":
            raise error
        rows.append(_row(work, name, absence(name, error), ()))
        players.pop(name, None), runs.pop(name, None)

    for name, make in CONTESTANTS.items():
        gc.collect()  # memory of removed peers
        try:
            players[name] = make(work)
            distances[name] = distance(players[name], gold)
        except Exception as error:
            remove(name, error)
            continue
        print("  {}: loss {:.1e} and gradient {:.1e} from {}".format(name, *distances[name], precision))
    del gold
    wrong = [
        name for name, found in distances.items() if any(x > limit for x, limit in zip(found, limits, strict=True))
    ]
    if wrong:
        raise SystemExit(f"  {', '.join(wrong)}: not the same loss or gradient: no numbers")
    for name in list(players):
        gc.collect()
        try:
            runs[name] = updater(players[name])
            runs[name]()
        except Exception as error:
            remove(name, error)
    times = alternate(runs, rounds, device)
    memory = {name: memory_growth(name, run, work, threads) for name, run in runs.items()}
    append("update.csv", rows)
    return report(work, players["ours"], times, memory)


def report(work: Workload, ours: Ours, times: dict, memory: dict) -> bool:
    flops = update_flops(ours.policy, [ours.batch()])
    name = device_name(work.device)
    sheet = find_sheet(name)
    print(f"\nupdate, {work.shape}, {work.dtype}, {name}, {len(times['ours'])} rounds")
    print(f"  {'':<14}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'ours / it':>22}{'grows MB':>10}{'MFU':>7}")
    goals = GOALS if work.device == "cpu" else {"trl": GPU_GOALS.get(work.shape.completion)}
    rows, ok = [], True
    for peer, values in times.items():
        p20, p50, p80 = (1e3 * value for value in quantiles(values))
        ratio = paired_ratio(times["ours"], values)
        share = flops / (p50 / 1e3) / sheet.bf16 if sheet else None
        shown = f"{ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}]"
        mfu = "" if share is None else f"{share:.2f}"
        print(f"  {peer:<14}{p20:>10.1f}{p50:>10.1f}{p80:>10.1f}{shown:>22}{memory[peer]:>10.0f}{mfu:>7}")
        extra = {"ratio": ratio[0], "ratio_low": ratio[1], "ratio_high": ratio[2]}
        extra |= {} if share is None else {"share": share}
        rows.append(_row(work, peer, "ms", (p20, p50, p80)) | extra)
        if peer == "ours" and share is not None:
            ok &= share >= MFU_GOAL
            print(f"  goal: MFU of at least {MFU_GOAL}, {'met' if share >= MFU_GOAL else 'NOT met'}")
        rows.append(_row(work, peer, "growth_mb", (memory[peer],) * 3))
        if goals.get(peer):
            met = ratio[0] <= goals[peer]
            ok &= met
            print(f"         goal: at most {goals[peer]:.3f} of {peer}, {'met' if met else 'NOT met'}")
    append("update.csv", rows)
    return ok


def _row(work: Workload, peer: str, metric: str, values: tuple[float, ...]) -> dict:
    return {
        "op": "update",
        "peer": peer,
        "shape": str(work.shape),
        "dtype": str(work.dtype).removeprefix("torch."),
        "metric": metric,
        **dict(zip(("p20", "p50", "p80"), values, strict=False)),
        "device": device_name(work.device),
        "versions": versions("torch", "transformers", "trl", "liger-kernel", "flash-attn"),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench update", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="mid; on a GPU 2B, 200 and 700 tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-tests", action="store_true", help="skip the tests; the numbers must not be quoted")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if not options.no_tests and not tests_pass(TESTS):
        return NO_NUMBERS
    shapes = CPU_SHAPES if options.device == "cpu" else GPU_SHAPES
    if options.sizes:
        shapes = [SIZES[name] for name in options.sizes]
    met = [compare(shape, options.device, options.rounds, options.threads) for shape in shapes]
    return 0 if all(met) else GOALS_MISSED
