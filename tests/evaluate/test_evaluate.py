"""Whole evaluations: prompts, answers, what is written down, going on after a stop, ranks, and the command."""

import copy
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest
from hugging_face import inputs, plain
from make_benchmarks import CVBENCH, blink_row, cvbench_row, flags, image, rows_of, write_blink, write_parquet
from make_files import picture
from transformers import GenerationConfig

from vtfast.cli.main import main
from vtfast.data import Sample, load_samples
from vtfast.data.processor import Processor
from vtfast.data.prompt_templates import IMAGE, load_template, render
from vtfast.distributed.ranks import Ranks
from vtfast.evaluate import BENCHMARKS, evaluate, run_benchmark
from vtfast.evaluate.benchmark_files import load_examples
from vtfast.evaluate.run_benchmark import exact_weights_digest
from vtfast.model.loading import load_model
from vtfast.utils.errors import UserError

# ------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "eval-r1-zero",
            "<|vision_start|><|image_pad|><|vision_end|><image>A conversation between User and Assistant. The user asks"
            " a question about the image, and the Assistant solves it. The assistant first thinks about the reasoning"
            " process in the mind and then provides the user with the answer.\nUser: Where?\n(A) here \nAssistant: Let"
            " me solve this step by step.\n<think>",
        ),
        (
            "eval-r1-zero-direct",
            "<|vision_start|><|image_pad|><|vision_end|><image>A conversation between User and Assistant. The user asks"
            " a question about the image, and the Assistant solves it.\nUser: Where?\n(A) here \nAssistant: ",
        ),
        (
            "eval-instruct",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>Where?\n(A) here\nOutput the thinking process in <think>"
            " </think> and final answer in <answer> </answer> tags.<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "eval-instruct-direct",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>Where?\n(A) here<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_the_studys_prompts(template, text):
    sample = Sample("Where?\n(A) here", ["here"], "here", [picture()])
    assert render(load_template(template), sample, literal_image=True) == text
    plain_text = render(load_template(template), sample)
    assert plain_text == text.replace("<image>", "") and plain_text.count(IMAGE) == 1


def test_sat_is_asked_as_in_training(files):
    """The same text as the training template makes of the same row and order of options."""
    example = next(load_examples(BENCHMARKS["sat"], files["sat"]))
    [sample, *_] = load_samples(files["sat"])
    sample.options = list(example.options)
    asked = type(sample)(example.question, sample.options, sample.answer, sample.images)
    assert render(load_template("eval-r1-zero"), asked) == render(load_template("r1-zero"), sample)


# ------------------------------------------------------------------------------------- answers


def test_answers_are_hugging_faces(base, base_path, files):
    """Greedy, a batch of several lengths, pixel limits of the processor: token for token what `generate` says."""
    processor = Processor.from_pretrained(base_path, min_pixels=784, max_pixels=2352)
    runner = run_benchmark.BenchmarkRunner(BENCHMARKS["cvbench"], base, processor, "eval-r1-zero", False, 10)
    examples = list(load_examples(BENCHMARKS["cvbench"], files["cvbench"]))[:3]
    batch: Future = Future()
    batch.set_result(runner.encode(examples))
    settings = GenerationConfig(do_sample=False, max_new_tokens=10, eos_token_id=processor.eos_ids, pad_token_id=0)
    for (_, prompt), row in zip(batch.result(), runner.respond(batch, False), strict=True):
        with plain(base) as module:
            theirs = module.generate(**inputs(prompt), generation_config=settings)[0, len(prompt.ids) :]
        assert row["response"] == processor.decode(theirs.tolist()) and row["tokens"] == len(theirs)


def test_evaluate_needs_no_folder(oracle, base, files):
    """Golds of the tiny file are B A B A B A by row; tasks Count Relation Count Depth Distance Depth."""
    result = evaluate(base, "cvbench", files["cvbench"], batch_size=4)
    assert result["count"] == 6 and result["total"] == result["strict"]["total"] == pytest.approx(3 / 6)
    assert result["by_task"] == {"Count": 0.0, "Relation": 1.0, "Depth": 1.0, "Distance": 0.0}
    assert result["by_source"] == {"ADE20K": 0.0, "COCO": 1.0, "Omni3D": pytest.approx(2 / 3)}
    assert result["official"] == pytest.approx((0.5 + 2 / 3) / 2) and result["truncated"] == 0
    assert oracle.calls == [4, 2]
    assert evaluate(base, "cvbench", files["cvbench"], 2)["count"] == 2


def test_the_prompt_holds_question_and_pixels(oracle, base, base_path, files, monkeypatch):
    seen = []
    monkeypatch.setattr(oracle, "say", staticmethod(lambda text: seen.append(text) or "B"))
    evaluate(base, "blink", files["blink"], 1, literal_image=True)
    evaluate(base, "blink", files["blink"], 1, template="eval-instruct-direct")
    question = BENCHMARKS["blink"].read(blink_row(0, "Relative_Depth"), 0).question
    assert seen[0].startswith(f"{IMAGE}<image>A conv") and f"\nUser: {question} \nAssistant: Let" in seen[0]
    assert f"{IMAGE}{question}<|im_end|>" in seen[1] and "<think>" not in seen[1]


# ---------------------------------------------------------------------------- files, going on


def test_a_stopped_evaluation_goes_on(base, files, tmp_path, monkeypatch):
    """Stopped between batches, then torn in the middle of a line: the file ends up the same, byte by byte."""
    ask = {"bench": "cvbench", "data": files["cvbench"], "max_completion_length": 8, "batch_size": 2}
    whole = evaluate(base, **ask, output=tmp_path / "whole")
    expected = (tmp_path / "whole" / "cvbench.jsonl").read_bytes()

    respond, batches = run_benchmark.BenchmarkRunner.respond, []

    def stopping(self, batch, progress):
        batches.append([example.index for example, _ in batch.result()])
        if len(batches) == 2:
            raise KeyboardInterrupt
        return respond(self, batch, progress)

    monkeypatch.setattr(run_benchmark.BenchmarkRunner, "respond", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(base, **ask, output=tmp_path / "part")
    file = tmp_path / "part" / "cvbench.jsonl"
    assert expected.startswith(file.read_bytes()) and len(rows_of(file)) == 2
    assert evaluate(base, **ask, output=tmp_path / "part") == whole
    assert file.read_bytes() == expected
    assert batches == [[0, 1], [2, 3], [2, 3], [4, 5]]

    file.write_bytes(expected[: len(expected) - 40])
    batches.clear()
    assert evaluate(base, **ask, output=tmp_path / "part") == whole
    assert file.read_bytes() == expected and batches == [[5]]


def test_more_items_later(oracle, base, files, tmp_path):
    evaluate(base, "cvbench", files["cvbench"], 2, output=tmp_path)
    assert evaluate(base, "cvbench", files["cvbench"], 4, output=tmp_path, batch_size=8)["count"] == 4
    assert evaluate(base, "cvbench", files["cvbench"], 1, output=tmp_path)["count"] == 4, "what is there counts"
    assert oracle.calls == [2, 2]


def test_answers_under_other_settings_are_refused(oracle, base, base_path, files, tmp_path):
    ask = {"bench": "cvbench", "data": files["cvbench"], "limit": 2, "output": tmp_path}
    evaluate(base, **ask)
    before = (tmp_path / "cvbench.jsonl").read_bytes()
    other = load_model(base_path)
    other.module.lm_head.weight.data[7] += 1e-3
    for policy, changed, name in (
        (other, {}, "model"),
        (base, {"template": "eval-instruct"}, "template"),
        (base, {"literal_image": True}, "literal_image"),
        (base, {"max_completion_length": 7}, "max_completion_length"),
        (base, {"processor": Processor.from_pretrained(base_path, max_pixels=784, min_pixels=784)}, "min_pixels"),
    ):
        with pytest.raises(UserError, match=rf"cvbench.jsonl: holds responses under other settings \({name}: "):
            evaluate(policy, **ask, **changed)
    other_data = write_parquet(tmp_path / "other.parquet", [cvbench_row(0, prompt="Else?")], CVBENCH)
    with pytest.raises(UserError, match="row 0 of the data is not the question"):
        evaluate(base, **ask | {"data": other_data})
    assert (tmp_path / "cvbench.jsonl").read_bytes() == before
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match="other settings"):
        evaluate(base, **ask)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0], "{torn", lines[1]],
        lambda lines: [lines[0].replace('"response"', '"reply"'), lines[1]],
        lambda lines: ["[]", lines[1]],
        lambda lines: [lines[0].replace('"gold": "B"', '"gold": "Z"'), lines[1]],
        lambda lines: [lines[0].replace('"gold": "B"', '"gold": "F"'), lines[1]],
    ],
)
def test_a_damaged_file_is_refused(oracle, base, files, tmp_path, damage):
    evaluate(base, "cvbench", files["cvbench"], 2, output=tmp_path)
    file = tmp_path / "cvbench.jsonl"
    file.write_text("".join(line + "\n" for line in damage(file.read_text().splitlines())))
    with pytest.raises(UserError, match=r"cvbench.jsonl, line [12]: damaged"):
        evaluate(base, "cvbench", files["cvbench"], 2, output=tmp_path)


def test_fingerprints(base, base_path, policy):
    assert exact_weights_digest(base) == exact_weights_digest(load_model(base_path))
    assert len({exact_weights_digest(each) for each in (base, policy, load_model(base_path, "bfloat16"))}) == 3


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("batch_size", 0), ("max_completion_length", 0)])
def test_impossible_numbers(base, files, name, value):
    with pytest.raises(UserError, match=f"--{name} {value}: must be at least 1"):
        evaluate(base, "blink", files["blink"], **{name: value})


# --------------------------------------------------------------------------------------- ranks


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.values = (size, threading.Barrier(size, timeout=60), [None] * size)

    def rank(self, number: int, device) -> Ranks:
        shared = self

        class Rank(Ranks):
            def gather(self, value):
                shared.values[self.rank] = value
                shared.barrier.wait()
                values = list(shared.values)
                shared.barrier.wait()
                return values

            def from_main(self, value):
                return copy.deepcopy(self.gather(value)[0])  # as a process of its own would have it

        return Rank(number, shared.size, device)

    def run(self, work) -> list:
        results = [None] * self.size

        def one(number: int) -> None:
            try:
                results[number] = work(number)
            except Exception as error:
                results[number] = error

        threads = [threading.Thread(target=one, args=(n,)) for n in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_ranks_share_the_questions(oracle, base, files, tmp_path):
    ask = {"bench": "cvbench", "data": files["cvbench"], "batch_size": 2}
    alone = evaluate(base, **ask, output=tmp_path / "one")
    oracle.calls.clear()
    group = Threads(2)
    both = group.run(lambda n: evaluate(base, **ask, output=tmp_path / "two", ranks=group.rank(n, base.device)))
    assert both == [alone, alone]
    assert sorted(oracle.calls) == [1, 1, 2, 2]
    one, two = (tmp_path / name / "cvbench.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_an_error_of_one_rank_is_everyones(oracle, base, tmp_path):
    rows = [cvbench_row(0), cvbench_row(1, image=image(1) | {"bytes": b"no picture"}), cvbench_row(2)]
    data = write_parquet(tmp_path / "test.parquet", rows, CVBENCH)
    group = Threads(2)
    errors = group.run(lambda n: evaluate(base, "cvbench", data, ranks=group.rank(n, base.device)))
    print(errors)
    assert all(isinstance(error, UserError) for error in errors)
    assert [str(error) for error in errors] == [f"{data}, row 1 (counted from 0): not an image of any known format"] * 2
    (tmp_path / "out").write_text("a file where the folder should be")
    errors = group.run(
        lambda n: evaluate(base, "cvbench", data, 1, output=tmp_path / "out", ranks=group.rank(n, base.device))
    )
    assert [str(error).split(":")[0] for error in errors] == [str(tmp_path / "out")] * 2


@pytest.mark.slow
def test_two_processes(files, tmp_path):
    """torchrun starts the installed command; the file is the one that a single process writes."""
    command = ["eval", "--model", "tiny-spatial-base", *flags(files, "--batch_size", "2")]
    assert main([*command, "--output_dir", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    program = [sys.executable, "-c", "import sys; from vtfast.cli import main; sys.exit(main(sys.argv[1:]))"]
    done = subprocess.run(
        [*launcher, *program, *command, "--device", "cpu", "--output_dir", str(tmp_path / "two")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("CV-Bench") == 1, "one table"
    for bench in files:
        one, two = (tmp_path / n / "evaluations" / "tiny-spatial-base" / f"{bench}.jsonl" for n in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("change", [{"answer": "(B)"}, {"image_1": image(99)}])
def test_answers_to_other_gold_or_other_images_are_not_taken(base, base_path, tmp_path, change):
    """BLINK asks the same words of every image, so question and options say too little."""
    processor = Processor.from_pretrained(base_path)
    rows = [blink_row(i, "Relative_Depth") for i in range(2)]
    write_blink(tmp_path / "data", rows)
    settings = {"processor": processor, "template": "eval-r1-zero", "output": tmp_path / "out"}
    settings |= {"max_completion_length": 4}
    evaluate(base, "blink", tmp_path / "data", **settings)
    evaluate(base, "blink", tmp_path / "data", **settings)  # the same again: nothing to ask
    shutil.rmtree(tmp_path / "data")
    write_blink(tmp_path / "data", [rows[0], rows[1] | change])
    with pytest.raises(UserError, match="row 1 of the data is not the question"):
        evaluate(base, "blink", tmp_path / "data", **settings)


def test_jsonl_with_image_files(base, base_path, tmp_path):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    row = cvbench_row(0)
    (folder / "images" / "a.png").write_bytes(row["image"]["bytes"])
    (folder / "test.jsonl").write_text(json.dumps({**row, "image": "a.png"}) + "\n")
    settings = {"processor": Processor.from_pretrained(base_path), "template": "eval-r1-zero"}
    scores = evaluate(base, "cvbench", folder / "test.jsonl", max_completion_length=4, **settings)
    assert scores["count"] == 1
    (folder / "images" / "a.png").unlink()
    with pytest.raises(UserError, match=r"line 1: .*a\.png"):
        evaluate(base, "cvbench", folder / "test.jsonl", max_completion_length=4, **settings)


def test_a_broken_image_is_told_before_the_first_question(base, base_path, tmp_path):
    whole = cvbench_row(0)["image"]["bytes"]
    rows = [cvbench_row(i) for i in range(3)]
    rows[2] = cvbench_row(2, image={"bytes": whole[: len(whole) // 2], "path": None})
    write_parquet(tmp_path / "test.parquet", rows, CVBENCH)
    settings = {"processor": Processor.from_pretrained(base_path), "output": tmp_path / "out"}
    with pytest.raises(UserError, match=r"test\.parquet, row 2 \(counted from 0\): (corrupt|not a readable) image"):
        evaluate(base, "cvbench", tmp_path / "test.parquet", template="eval-r1-zero", batch_size=1, **settings)
    assert not (tmp_path / "out" / "cvbench.jsonl").exists()
