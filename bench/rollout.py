"""`python -m bench rollout`: tokens for 4 prompts with an image x 8 samples, beside Hugging Face's generate.

Both sample from the full softmax at temperature 1 with the same weights, batch and number of tokens; none stops early.
    ours   the trainer's rollout engine
    hf     generate(num_return_sequences=8): batched, KV cache, left padding
The engine's tests run first. Rows are appended to results/rollout.csv.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from bench._harness import ROOT, alternate, append, device_name, paired_ratio, quantiles, versions
from bench._workload import MID, TINY, TWO_B, Workload
from vtfast.attention import choose_backend
from vtfast.model import Policy
from vtfast.rollout import RolloutEngine, Sampling

GOALS = {"mid": 1 / 2.5, "tiny": 1 / 1.5, "Qwen2-VL-2B": 1 / 20}  # our time / generate's


def ours(work: Workload) -> Callable[[], object]:
    policy = Policy(work.module.eval(), (), choose_backend("auto", work.device, work.dtype))
    engine = RolloutEngine(policy)
    sampling = Sampling(temperature=1.0, max_new_tokens=work.shape.completion)
    seeds = iter(range(10**9))

    def run() -> list:
        return engine.generate(work.prompts, work.shape.G, sampling, seed=next(seeds))

    return run


def hugging_face(work: Workload) -> Callable[[], object]:
    module = work.clone().eval()
    prompts = [prompt.ids.flip(0) for prompt in work.prompts]
    ids = pad_sequence(prompts, batch_first=True).flip(1)
    batch = {
        "input_ids": ids,
        "attention_mask": pad_sequence(
            [torch.ones_like(p) for p in prompts], batch_first=True
        ).flip(1),
        "pixel_values": torch.cat([p.pixels for p in work.prompts]).to(work.dtype),
        "image_grid_thw": torch.cat([p.grid for p in work.prompts]),
        "mm_token_type_ids": (ids == work.config.image_token_id).long(),
    }
    batch = {name: value.to(work.device) for name, value in batch.items()}
    n = work.shape.completion
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=work.shape.G, max_new_tokens=n,
        min_new_tokens=n, eos_token_id=0, pad_token_id=0, use_cache=True,
    )  # fmt: skip
    return lambda: module.generate(**batch, generation_config=settings)


def compare(shape, device: str, rounds: int) -> bool:
    work = Workload(shape, device)
    runs = {"ours": ours(work), "hf": hugging_face(work)}
    for name, run in runs.items():
        done = run()
        counts = (
            {len(row.tokens) for group in done for row in group}
            if name == "ours"
            else {done.shape[1] - max(len(p.ids) for p in work.prompts)}
        )
        assert counts == {shape.completion}, (name, counts)
    times = alternate(runs, rounds, device)
    tokens = len(work.prompts) * shape.G * shape.completion
    print(f"\nrollout, {shape}, {work.dtype}, {device_name(device)}, {rounds} rounds")
    print(f"  {'':<8}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'ours / it':>22}{'tokens/s':>10}")
    rows = []
    for peer, values in times.items():
        p20, p50, p80 = (1e3 * value for value in quantiles(values))
        ratio = paired_ratio(times["ours"], values)
        shown = f"{ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}]"
        rate = tokens / p50 * 1e3
        print(f"  {peer:<8}{p20:>10.1f}{p50:>10.1f}{p80:>10.1f}{shown:>22}{rate:>10.0f}")
        rows.append(
            {
                "op": "rollout",
                "peer": peer,
                "shape": str(shape),
                "dtype": str(work.dtype).removeprefix("torch."),
                "metric": "ms",
                "p20": p20,
                "p50": p50,
                "p80": p80,
                "ratio": ratio[0],
                "ratio_low": ratio[1],
                "ratio_high": ratio[2],
                "device": device_name(device),
                "versions": versions("torch", "transformers"),
            }
        )
    goal = GOALS[shape.model]
    met = paired_ratio(times["ours"], times["hf"])[0] <= goal
    print(f"  goal: at most {goal:.3f} of generate, {'met' if met else 'NOT met'}")
    append("rollout.csv", rows)
    return met


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench rollout", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--no-tests", action="store_true", help="numbers not fit for quoting")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if not options.no_tests:
        print("tests of the engine first ...", flush=True)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            str(ROOT / "tests" / "test_rollout.py"),
        ]
        if subprocess.run(command, cwd=ROOT).returncode:
            print("a test fails: no numbers")
            return 1
    shapes = [TINY, MID] if options.device == "cpu" else [TWO_B]
    met = [compare(shape, options.device, options.rounds) for shape in shapes]
    return 0 if all(met) else 1
