"""`python -m bench rollout`: whole rollouts beside Hugging Face's generate, and decode steps beside the memory's limit.

Rollouts: 4 prompts with an image x 8 samples (2 x 8 on a GPU). Both sample from the full softmax at temperature 1 with
the same weights, batch and number of tokens; none stops early.
    ours   the trainer's rollout engine
    hf     generate(num_return_sequences=8): batched, KV cache, left padding
Decode steps, on a GPU: 1 to 256 rows in groups of 8, replayed from graphs and launched one by one. The floor is the
time that the weights once, a group's prompt once and a row's own tokens once take at the data sheet's bandwidth.
The engine's tests run first. Rows are appended to results/rollout.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from bench._harness import (
    GOALS_MISSED,
    NO_NUMBERS,
    alternate,
    append,
    device_name,
    paired_ratio,
    quantiles,
    seconds,
    tests_pass,
    versions,
)
from bench._workload import SIZES, Shape, Workload
from vtfast.cost.devices import find_sheet
from vtfast.cost.roofline import ModelSize
from vtfast.model.attention import choose_backend
from vtfast.model.policy import Policy
from vtfast.rollout import RolloutEngine, Sampling
from vtfast.rollout.attention import BACKENDS
from vtfast.rollout.scheduler import Scheduler

TESTS = ("rollout/test_rollout.py", "rollout/test_rollout_graphs.py")
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
        "attention_mask": pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True).flip(1),
        "pixel_values": torch.cat([p.pixels for p in work.prompts]).to(work.dtype),
        "image_grid_thw": torch.cat([p.grid for p in work.prompts]),
        "mm_token_type_ids": (ids == work.config.image_token_id).long(),
    }
    batch = {name: value.to(work.device) for name, value in batch.items()}
    n = work.shape.completion
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=work.shape.G,
        max_new_tokens=n,
        min_new_tokens=n,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=True,
    )
    return lambda: module.generate(**batch, generation_config=settings)


ROWS = {"cpu": (8, 32), "cuda": (1, 8, 16, 64, 128, 256)}
STEPS = 16
FLOOR_GOAL = {64: 0.6}  # share of the floor, by rows


@torch.no_grad()
def decode_steps(shape: Shape, device: str, rounds: int, attention: str) -> bool:
    """Milliseconds of a decode step by rows, and how near to the floor they are."""
    print(f"\ndecode, {shape.model}, {shape.completion} tokens at most, {device_name(device)}, attention {attention}")
    names = ("p20 ms", "p50 ms", "p80 ms", "tokens/s", "of floor", "kernels/layer")
    print(f"  {'rows':>6}{'':>8}" + "".join(f"{name:>14}" for name in names))
    met, rows = True, []
    for count in ROWS[device]:
        G = min(8, count)
        prompts = count // G
        work = Workload(replace(shape, text=shape.text[:1] * prompts, grids=shape.grids[:1] * prompts, G=G), device)
        policy = Policy(work.module.eval(), (), choose_backend("auto", device, work.dtype))
        for mode in ("graph", "eager") if device == "cuda" else ("eager",):
            engine = RolloutEngine(policy, graphs=mode == "graph", attention=attention, steps_per_sync=STEPS)
            run = start(engine, work, rounds)
            times = [seconds(run.decode, device) / STEPS * 1e3 for _ in range(rounds)]
            p20, p50, p80 = quantiles(times)
            tokens = sum(len(prompt.ids) for prompt in work.prompts)
            own = STEPS * (rounds + 2) / 2  # the middle of what was timed, behind the steps of `start`
            share = share_of_floor(policy, tokens + count * own, p50 / 1e3)
            kernels = kernels_a_layer(run, policy) if device == "cuda" and mode == "eager" else None
            cells = [*(f"{x:.3f}" for x in (p20, p50, p80)), f"{count / p50 * 1e3:.0f}"]
            cells += ["" if share is None else f"{share:.0%}", str(kernels or "")]
            print(f"  {count:>6}{mode:>8}" + "".join(f"{cell:>14}" for cell in cells))
            if mode == "graph" and share is not None and share < FLOOR_GOAL.get(count, 0):
                print(f"  goal: {FLOOR_GOAL[count]:.0%} of the floor at {count} rows, NOT met")
                met = False
            rows.append(
                {
                    "op": "decode",
                    "peer": f"{mode}, {attention} attention",
                    "shape": f"{shape.model} rows={count}",
                    "dtype": str(work.dtype).removeprefix("torch."),
                    "metric": "ms a step",
                    "p20": p20,
                    "p50": p50,
                    "p80": p80,
                    "share": share,
                    "device": device_name(device),
                    "versions": versions("torch", "triton"),
                }
            )
            run.release()
    append("rollout.csv", rows)
    return met


def start(engine: RolloutEngine, work: Workload, rounds: int) -> Scheduler:
    """A rollout behind its prefill and first steps, with room for `rounds` times STEPS more."""
    sampling = Sampling(max_new_tokens=STEPS * (rounds + 4))
    run = engine.start(work.prompts, work.shape.G, sampling)
    for part in run.schedule():
        run.prefill(part)
    run.decode()  # compiles and captures
    return run


def share_of_floor(policy: Policy, cached_tokens: float, seconds_a_step: float) -> float | None:
    """Bytes of weights and of keys and values, each read once, at the data sheet's bandwidth, over the time taken."""
    sheet = find_sheet(device_name(policy.device.type))
    if sheet is None:
        return None
    return ModelSize.of(policy).decode_bytes(cached_tokens) / sheet.bandwidth / seconds_a_step


def kernels_a_layer(run: Scheduler, policy: Policy) -> float:
    """Kernels of a step over layers; what the head and the bookkeeping launch is in it."""
    rows = run.workspace.rows.slice(0, len(run.running))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.decode_step(rows)
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = sum(event.count for event in profile.key_averages() if event.device_type == on_gpu)
    return round(kernels / policy.language_model.config.num_hidden_layers, 1)


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
    parser = argparse.ArgumentParser(prog="python -m bench rollout", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="tiny and mid; 2B on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--attention", choices=("auto", *BACKENDS), default="auto", help="of decode steps")
    parser.add_argument("--no-tests", action="store_true", help="numbers not fit for quoting")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if not options.no_tests and not tests_pass(TESTS):
        return NO_NUMBERS
    names = options.sizes or (["tiny", "mid"] if options.device == "cpu" else ["2B"])
    shapes = [SIZES[name] for name in names]
    met = [compare(shape, options.device, options.rounds) for shape in shapes]
    met.append(decode_steps(shapes[-1], options.device, options.rounds, options.attention))
    return 0 if all(met) else GOALS_MISSED
