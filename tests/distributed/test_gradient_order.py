"""ZeRO-2 adds up buckets of gradients in the order in which they come. All ranks must bring them in one order, whatever
their micro-batches hold; with another order a rank would add its gradient to that of another weight, in silence."""

import json
import subprocess

import pytest
from launchers import ROOT, deepspeed_launcher, environment
from PIL import Image

SCRIPT = """
import json, os, sys
from dataclasses import replace
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero
from vtfast.training.groups import MicroBatch
from vtfast.training.update import Updater

reduce, accumulate, order = Zero.reduce_independent_p_g_buckets_and_remove_grads, Updater.accumulate, []
def recorded(self, parameter, group):
    order.append(self.get_param_id(parameter))
    return reduce(self, parameter, group)
Zero.reduce_independent_p_g_buckets_and_remove_grads = recorded

def kind(batch):
    if not batch.parts:
        return "blank"
    images = any(batch.groups[part.group].prompt.images for part in batch.parts)
    return "image" if images else "text"

def compared(self, step, batches, *rest):
    order.clear()
    first = batches.micro_batches[0]
    mixed = [*batches.micro_batches, MicroBatch([], first.groups, first.policy)]
    turn = self.ranks.rank * (len(mixed) // 2)
    batches = replace(batches, micro_batches=mixed[turn:] + mixed[:turn])  # another kind on another rank
    result = accumulate(self, step, batches, *rest)
    kinds = [kind(batch) for batch in batches.micro_batches]
    everyone = self.ranks.gather((list(order), kinds))
    assert all(orders == everyone[0][0] for orders, _ in everyone), "another order on another rank"
    per_pass = len(order) // len(kinds)
    passes = {tuple(order[i * per_pass : (i + 1) * per_pass]) for i in range(len(kinds))}
    if self.ranks.is_main:
        line = {"kinds": [kinds for _, kinds in everyone], "hooks": per_pass, "orders": len(passes)}
        with open(os.environ["SEEN"], "a") as file:
            print(json.dumps(line), file=file)
    return result
Updater.accumulate = compared

from vtfast.cli.main import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--gradient_checkpointing", "true"], ["--dtype", "bfloat16"]])
def test_all_ranks_bring_gradients_in_one_order(tmp_path, flags):
    (tmp_path / "script.py").write_text(SCRIPT)
    Image.new("RGB", (56, 84), (9, 99, 200)).save(tmp_path / "image.png")
    rows = [{"question": "which?" + " far" * n, "answer": "1", "image": ["image.png"][n % 2 :]} for n in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--data", str(data), "--eval_data", "none", "--max_steps", "3", "--num_generations", "2"]
    settings += ["--max_completion_length", "6", "--per_device_train_batch_size", "3", "--token_budget", "1"]
    command = [*deepspeed_launcher(), str(tmp_path / "script.py"), *settings, *flags]
    done = subprocess.run(
        [*command, "--beta", "0.04", "--report_to", "none", "--output_dir", str(tmp_path / "run")],
        env=environment() | {"SEEN": str(tmp_path / "seen"), "TORCH_DISTRIBUTED_DEBUG": "DETAIL"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert len(seen) == 3 and all(step["orders"] == 1 and step["hooks"] > 50 for step in seen)
    met = {pair for step in seen for pair in zip(*step["kinds"], strict=True)}
    assert any(set(pair) == {"image", "text"} for pair in met), met
    assert any("blank" in pair for pair in met), met
