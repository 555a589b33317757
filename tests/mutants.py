"""`python -m tests.mutants`: change the kernels in one place at a time; a test must fail each time.

Each mutant is a copy of kernels/ with one line changed, before which the tests that should see it run: under Triton's
interpreter, or on the CPU path. Prints those that survived; exit status 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    tests: str
    """A file of tests/kernels/, and after a space what `pytest -k` gets."""
    interpreted: bool = True


HEAD, LOSS, LOGPROB, SAMPLE = (
    f"test_{name}.py" for name in ("hopper_path", "linear_grpo_loss", "linear_logprob", "linear_sample")
)
SPARSE, GLUON = "test_sparse_gradient.py", "test_gluon.py events"
DECODE, PAGED, REGISTRY = "test_decode_layers.py norm", "test_paged_attention.py", "test_registry.py"
MUTANTS = [
    # statistics of a softmax
    Mutant("online_softmax.py", "new_top = tl.maximum(top, tl.max(z, 1))", "new_top = top * 0.0", LOGPROB),
    Mutant("online_softmax.py", "mean = (mean + total * shift) * rescale + tl.sum", "mean = mean + tl.sum", LOGPROB),
    Mutant("online_softmax.py", "total * rescale + other_total * other_rescale", "total + other_total", LOGPROB),
    Mutant("online_softmax.py", "other_mean + other_total * other_shift", "other_mean", LOGPROB),
    Mutant("online_softmax.py", "tl.sum((mean + total * shift) * rescale, 0)", "tl.sum(mean * rescale, 0)", LOSS),
    Mutant("online_softmax.py", "below = (z - new_top[:, None]) * scale", "below = z - new_top[:, None]", LOGPROB),
    # linear_logprob
    Mutant("linear_logprob.py", "(offs_v < V)[None, :], as_in", "(offs_v < V + 1)[None, :], as_in", LOGPROB),
    Mutant("linear_logprob.py", "for split in range(num_splits):", "for split in range(num_splits - 1):", LOGPROB),
    Mutant("online_softmax.py", "return z.to(ROUND).to(tl.float32)", "return z", f"{LOSS} equal_weights"),
    Mutant("linear_logprob.py", "weight.load([column, k])", "weight.load([column + BLOCK_V, k])", f"{HEAD} tma"),
    Mutant("linear_logprob.py", "hidden.load([row, k])", "hidden.load([0, k])", f"{HEAD} tma"),
    Mutant("linear_logprob.py", "tl.where(scored, logp, 0.0)", "logp", LOGPROB),
    Mutant(
        "linear_logprob.py", "is_target = offs_v[None, :] == target", "is_target = offs_v[None, :] <= target", LOGPROB
    ),
    Mutant("linear_logprob.py", "overwrite=a == 0", "overwrite=True", LOGPROB, False),
    # the Gluon forward, in the emulator
    Mutant("gluon_ring.py", "ARRIVALS = 16", "ARRIVALS = 8", GLUON, False),
    Mutant("gluon_ring.py", "(step // S.stages + 1) % 2", "0", GLUON, False),
    Mutant("gluon_ring.py", "warpgroup_mma_wait(1, deps", "warpgroup_mma_wait(2, deps", GLUON, False),
    Mutant("gluon_ring.py", "[row + S.rows, k]", "[row, k]", GLUON, False),
    Mutant("gluon_logprob.py", "(offs_v < V)[None, :]", "(offs_v < V + 1)[None, :]", GLUON, False),
    Mutant("gluon_ring.py", "a.index(2 * slot + CONSUMER)", "a.index(2 * slot)", GLUON, False),
    Mutant("gluon_ring.py", "step // S.stages % 2)", "0)", GLUON, False),
    Mutant("gluon_ring.py", "if k > 0:\n", "if k >= 0:\n", GLUON, False),
    Mutant("gluon_logprob.py", "    cluster_barrier()\n    for item", "    for item", GLUON, False),
    Mutant("gluon_exponentials.py", "tma.store_wait(0)  # the", "# the", GLUON, False),
    Mutant("gluon_exponentials.py", "[row, column], buffer", "[row, 0], buffer", GLUON, False),
    Mutant("gluon_exponentials.py", "(1, ring, plan, result, second", "(1, ring, plan, result, first", GLUON, False),
    Mutant("gluon_exponentials.py", "mean += gl.sum(e * y, 1)", "mean += gl.sum(e, 1)", GLUON, False),
    # rows of logits
    Mutant("chunked_logits.py", "factor = -g\n        if ENTROPY:", "factor = g\n        if ENTROPY:", LOSS),
    Mutant("chunked_logits.py", "(g + tl.exp2(target_z) * factor)", "(tl.exp2(target_z) * factor)", LOGPROB),
    Mutant(
        "chunked_logits.py", "h = tl.where(scored, h, 0.0) * inv_temperature", "h = tl.where(scored, h, 0.0)", LOGPROB
    ),
    Mutant("chunked_logits.py", "z = z * scale - offset\n", "z = z * scale - offset + 1.0\n", LOSS),
    Mutant("chunked_logits.py", "mean += tl.sum(e * z, 1)", "mean += tl.sum(z, 1)", LOSS),
    Mutant("chunked_logits.py", "mask=rows < n, other=0.0)", "mask=rows < n - 1, other=0.0)", LOSS),
    Mutant(
        "chunked_logits.py",
        "torch.mm(a, b, out_dtype=torch.float32, out=acc)",
        "torch.mm(a, b, out=acc)",
        f"{HEAD} cublas",
        False,
    ),
    Mutant(
        "chunked_logits.py",
        "torch.addmm(acc, a, b, out_dtype",
        "torch.addmm(acc, b, a, out_dtype",
        f"{HEAD} cublas",
        False,
    ),
    Mutant(
        "chunked_logits.py",
        "torch.mm(d, weight, out_dtype=torch.float32)",
        "torch.mm(d, weight)",
        f"{HEAD} cublas",
        False,
    ),
    Mutant("chunked_logits.py", "e.scatter_add_(1, target[:, None], -self.total[:, None])", "pass", LOSS, False),
    # the loss
    Mutant("loss_chunks.py", "(tl.exp2(z_target) - total)", "tl.exp2(z_target)", LOSS),
    Mutant("loss_chunks.py", "g * -self.inv_temperature / total", "g * -1.0 / total", LOSS),
    Mutant("loss_chunks.py", "(self.total > MAX_DRIFT) | ", "", f"{LOSS} drift"),
    Mutant("loss_chunks.py", " | (self.total < 1 / MAX_DRIFT)", "", f"{LOSS} drift"),
    Mutant(
        "loss_chunks.py",
        ".nan_to_num(nan=0.0, posinf",
        ".nan_to_num(nan=1e30, posinf",
        f"{LOSS} reads_the_logits_once",
        False,
    ),
    Mutant("loss_chunks.py", "self.is_gradient = not statistics", "self.is_gradient = True", LOSS),
    Mutant("loss_chunks.py", "gradient = d_logp * c + d_weight * c", "gradient = d_logp * c", LOSS),
    Mutant("linear_grpo_loss.py", "scale=tokens.scale * ctx.power", "scale=tokens.scale", f"{LOSS} fp16_gradients"),
    Mutant("linear_grpo_loss.py", "loss if ctx.power is None else loss / ctx.power", "loss", f"{LOSS} half_precision"),
    Mutant(
        "linear_grpo_loss.py",
        "tokens.scored & (tokens.advantage != 0)",
        "tokens.advantage > 0",
        f"{LOSS} set_aside",
        False,
    ),
    Mutant("loss_chunks.py", "else self.near[index]", "else self.near[: len(index)]", f"{LOSS} near_their", False),
    Mutant("objective.py", "number, right=True)", "number, right=False)", f"{LOSS} set_aside"),
    Mutant(
        "chunks.py", "processors // triton.cdiv(hidden_size, TILE_COLUMNS)", "processors // 4", f"{HEAD} waves", False
    ),
    Mutant("loss_settings.py", "1.0 + spec.epsilon_high", "1.0 + spec.epsilon_low", "test_grpo_loss.py", False),
    # sparse gradients
    Mutant("likely_columns.py", "least = (THRESHOLD * total)", "least = (THRESHOLD + 0 * total)", SPARSE, False),
    Mutant("likely_columns.py", "unlikely.scatter_(1, target[:, None], 0.0)", "pass", f"{SPARSE} reference", False),
    Mutant("likely_columns.py", "live & (outside <= tau)", "live", f"{SPARSE} reference", False),
    Mutant("likely_columns.py", "live & (outside", "(outside", f"{SPARSE} reference", False),
    Mutant("likely_columns.py", " & (count <= MOST_COLUMNS)", "", f"{SPARSE} reference and tied", False),
    Mutant("likely_columns.py", "(rows >= limit)[chosen]", "(rows >= limit)", f"{SPARSE} reference", False),
    Mutant("likely_columns.py", "kept[targets[chosen]] = True", "pass", f"{SPARSE} reference", False),
    Mutant("likely_columns.py", "(x - top) * scale - log_total", "(x - top) * scale", f"{SPARSE} reference"),
    Mutant("likely_columns.py", "tl.maximum(x * inv_total, 0.0)", "tl.maximum(x, 0.0)", f"{SPARSE} drift"),
    Mutant("likely_columns.py", "if (tl.load(gradient_ptr + token) != 0) & ", "if ", f"{SPARSE} reference"),
    Mutant("likely_columns.py", "tl.where(rare, p_target, 0.0)", "0.0", f"{SPARSE} reference"),
    Mutant("likely_columns.py", "columns = tl.sum(count, 0) + rare", "columns = 0 + rare", f"{SPARSE} flat"),
    Mutant("likely_columns.py", "if (dropped <= tau) & ", "if ", f"{SPARSE} reference"),
    Mutant("likely_columns.py", "tl.store(block_ptr + target, rare | True)", "pass", f"{SPARSE} reference"),
    Mutant("likely_columns.py", "(row // BLOCK_ROWS)", "(row // BLOCK_ROWS * 0)", f"{SPARSE} reference"),
    Mutant("sparse_gradient.py", "d[holes] = d[order[holes]]", "pass", f"{SPARSE} reference", False),
    Mutant("sparse_gradient.py", "rows[len(rows) - len(holes) :]", "rows[: len(holes)]", f"{SPARSE} front", False),
    Mutant("sparse_gradient.py", "matmuls.add_columns(first + rows", "matmuls.add_columns(rows", SPARSE, False),
    Mutant("sparse_gradient.py", "matmuls.add(first + order", "matmuls.add(order", f"{SPARSE} set_aside", False),
    Mutant("sparse_gradient.py", "chunk.factor[rows]", "chunk.factor[: len(rows)]", f"{SPARSE} reference", False),
    Mutant("sparse_gradient.py", "dense = live & ~", "dense = ~", f"{SPARSE} reference", False),
    Mutant("gradient_matmuls.py", " and inputs.sparse_tau == 0", "", f"{SPARSE} set_aside", False),
    Mutant("gradient_matmuls.py", "index_add_(0, columns, product)", "index_copy_(0, columns, product)", SPARSE, False),
    Mutant("gradient_matmuls.py", "self.overwrite = False", "pass", f"{LOSS} bitwise or set_aside", False),
    Mutant("loss_chunks.py", " or (inputs.sparse_tau > 0 and self.offset is None)", "", f"{SPARSE} reference"),
    # decode
    Mutant(
        "linear_sample.py", "weight.load([tile * BLOCK_V, k])", "weight.load([tile * BLOCK_V + 1, k])", f"{HEAD} tma"
    ),
    Mutant("linear_sample.py", "hidden.load([row, k])", "hidden.load([row, 0])", f"{HEAD} tma"),
    Mutant("linear_sample.py", "score = top - tl.log2(best)", "score = top + tl.log2(best)", SAMPLE),
    Mutant("linear_sample.py", "tl.min(tl.where(race == best", "tl.max(tl.where(race >= best", SAMPLE),
    Mutant("sampling_noise.py", "((ids & 1) * 32)", "((ids & 1) * 31)", SAMPLE),
    Mutant("paged_attention.py", "in_span = lane < end - first", "in_span = lane <= end - first", PAGED),
    Mutant("paged_attention.py", "(arrived == parts - 1)", "(arrived == parts - 2)", f"{HEAD} any_order"),
    Mutant("paged_attention.py", "tl.store(arrivals_ptr + query, 0, mask=is_last)", "pass", PAGED),
    Mutant("paged_attention.py", "first = row - in_block", "first = row", PAGED),
    Mutant("paged_attention.py", "following // S.page", "first // S.page", PAGED),
    Mutant("add_rms_norm.py", "/ D + eps)", "/ D)", DECODE),
]


def survives(mutant: Mutant) -> bool:
    """Whether every test passes with the changed line."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "vtfast_kernels"
        shutil.copytree(ROOT / "kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
        file = package / mutant.file
        text = file.read_text("utf-8")
        if text.count(mutant.old) < 1:
            raise SystemExit(f"{mutant.file} has no longer: {mutant.old}")
        file.write_text(text.replace(mutant.old, mutant.new, 1), "utf-8")
        name, *expression = mutant.tests.split(" ", 1)
        command = [sys.executable, "-m", "pytest", f"tests/kernels/{name}", "-x", "-q", "-m", "not slow and not gpu"]
        command += ["-p", "no:cacheprovider", *(["-k", expression[0]] if expression else [])]
        env = os.environ | {"PYTHONPATH": folder, "TRITON_INTERPRET": str(int(mutant.interpreted))}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{mutant.file}: {mutant.new}: the tests did not run\n{done.stdout[-2000:]}")
        return done.returncode == 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--file", default="", help="only mutants of files whose name contains this")
    chosen = [mutant for mutant in MUTANTS if parser.parse_args(argv).file in mutant.file]
    survivors = [mutant for mutant in tqdm(chosen, unit="mutant", desc="mutants") if survives(mutant)]
    for mutant in survivors:
        print(f"survived: {mutant.file}: {mutant.old!r} -> {mutant.new!r}")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants were seen by a test")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
