"""Whole evaluations: prompts, answers, what is written down, going on after a stop, ranks, and the command."""

import copy
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from hugging_face import inputs, plain
from make_benchmarks import (
    CVBENCH,
    blink_row,
    cvbench_row,
    image,
    sample_rows,
    write_all,
    write_blink,
    write_parquet,
)
from make_files import picture
from transformers import GenerationConfig

from vtfast.cli import main
from vtfast.data import Sample, load_samples
from vtfast.distributed import Ranks
from vtfast.errors import UserError
from vtfast.evaluate import BENCHMARKS, evaluate, evaluation
from vtfast.evaluate.checkpoints import default_template, find_checkpoint
from vtfast.evaluate.evaluation import fingerprint
from vtfast.evaluate.files import load_items
from vtfast.model import load_model
from vtfast.processor import Processor
from vtfast.prompts import IMAGE, load_template, render
from vtfast.rollout import Completion

COUNTS = {bench: len(rows) for bench, rows in sample_rows().items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def base(base_path):
    return load_model(base_path)


@pytest.fixture
def run_folder(tmp_path, base_path) -> Path:
    """A run with one checkpoint, whose images were limited to 4 merged tokens."""
    run = tmp_path / "run"
    shutil.copytree(base_path, run / "checkpoints" / "step-100")
    (run / "config.yaml").write_text(
        yaml.safe_dump(
            {"template": "r1-zero", "literal_image": True, "min_pixels": 784, "max_pixels": 784}
        )
    )
    return run


def flags(files: dict[str, Path], *more: str) -> list[str]:
    data = ",".join(f"{bench}={path}" for bench, path in files.items())
    return ["--bench", ",".join(files), "--data", data, "--max_completion_length", "12", *more]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    item = next(load_items(BENCHMARKS["sat"], files["sat"]))
    [sample, *_] = load_samples(files["sat"])
    sample.options = list(item.options)
    asked = type(sample)(item.question, sample.options, sample.answer, sample.images)
    assert render(load_template("eval-r1-zero"), asked) == render(load_template("r1-zero"), sample)


# ------------------------------------------------------------------------------------- answers


def test_answers_are_hugging_faces(base, base_path, files):
    """Greedy, a batch of several lengths, pixel limits of the processor: token for token what `generate` says."""
    processor = Processor.from_pretrained(base_path, min_pixels=784, max_pixels=2352)
    asker = evaluation._Asker(base, processor, "eval-r1-zero", False, 10)
    items = list(load_items(BENCHMARKS["cvbench"], files["cvbench"]))[:3]
    batch = asker.encode(items)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=10, eos_token_id=processor.eos_ids, pad_token_id=0
    )
    for (_, prompt), row in zip(
        batch, asker.answer(BENCHMARKS["cvbench"], batch, False), strict=True
    ):
        with plain(base) as module:
            theirs = module.generate(**inputs(prompt), generation_config=settings)[
                0, len(prompt.ids) :
            ]
        assert row["response"] == processor.decode(theirs.tolist()) and row["tokens"] == len(theirs)


class Oracle:
    """In the engine's place: answers (A) to every prompt, or what `say` makes of its text. `calls`: batch sizes."""

    def __init__(self, policy) -> None:
        pass

    say = staticmethod(lambda prompt: "so</think> <answer>(A)</answer>")
    calls: list[int]

    def generate(self, prompts, num_generations, sampling, progress=False):
        assert num_generations == 1 and sampling.greedy
        Oracle.calls.append(len(prompts))
        tokenize = Oracle.processor.tokenizer
        texts = [Oracle.say(prompt.text) for prompt in prompts]
        return [[Completion(tokenize(text)["input_ids"], [], "stop")] for text in texts]


@pytest.fixture
def oracle(monkeypatch, base_path):
    monkeypatch.setattr(evaluation, "RolloutEngine", Oracle)
    monkeypatch.setattr(Oracle, "processor", Processor.from_pretrained(base_path), raising=False)
    monkeypatch.setattr(Oracle, "calls", [], raising=False)
    return Oracle


def test_evaluate_needs_no_folder(oracle, base, files):
    """Golds of the tiny file are B A B A B A by row; tasks Count Relation Count Depth Distance Depth."""
    result = evaluate(base, "cvbench", files["cvbench"], batch_size=4)
    assert result["count"] == 6 and result["total"] == result["strict"]["total"] == pytest.approx(
        3 / 6
    )
    assert result["by_task"] == {"Count": 0.0, "Relation": 1.0, "Depth": 1.0, "Distance": 0.0}
    assert result["by_source"] == {"ADE20K": 0.0, "COCO": 1.0, "Omni3D": pytest.approx(2 / 3)}
    assert result["official"] == pytest.approx((0.5 + 2 / 3) / 2) and result["truncated"] == 0
    assert oracle.calls == [4, 2]
    assert evaluate(base, "cvbench", files["cvbench"], 2)["count"] == 2


def test_the_prompt_holds_question_and_pixels(oracle, base, base_path, files, monkeypatch):
    seen = []
    monkeypatch.setattr(Oracle, "say", staticmethod(lambda text: seen.append(text) or "B"))
    evaluate(base, "blink", files["blink"], 1, literal_image=True)
    evaluate(base, "blink", files["blink"], 1, template="eval-instruct-direct")
    question = BENCHMARKS["blink"].read(blink_row(0, "Relative_Depth"), 0).question
    assert (
        seen[0].startswith(f"{IMAGE}<image>A conv")
        and f"\nUser: {question} \nAssistant: Let" in seen[0]
    )
    assert f"{IMAGE}{question}<|im_end|>" in seen[1] and "<think>" not in seen[1]


# ---------------------------------------------------------------------------- files, going on


def test_a_stopped_evaluation_goes_on(base, files, tmp_path, monkeypatch):
    """Stopped between batches, then torn in the middle of a line: the file ends up the same, byte by byte."""
    ask = {
        "bench": "cvbench",
        "data": files["cvbench"],
        "max_completion_length": 8,
        "batch_size": 2,
    }
    whole = evaluate(base, **ask, output=tmp_path / "whole")
    expected = (tmp_path / "whole" / "cvbench.jsonl").read_bytes()

    answer, batches = evaluation._Asker.answer, []

    def stopping(self, benchmark, batch, progress):
        batches.append([item.index for item, _ in batch])
        if len(batches) == 2:
            raise KeyboardInterrupt
        return answer(self, benchmark, batch, progress)

    monkeypatch.setattr(evaluation._Asker, "answer", stopping)
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
    assert (
        evaluate(base, "cvbench", files["cvbench"], 4, output=tmp_path, batch_size=8)["count"] == 4
    )
    assert evaluate(base, "cvbench", files["cvbench"], 1, output=tmp_path)["count"] == 4, (
        "what is there counts"
    )
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
        (
            base,
            {"processor": Processor.from_pretrained(base_path, max_pixels=784, min_pixels=784)},
            "min_pixels",
        ),
    ):
        with pytest.raises(
            UserError, match=rf"cvbench.jsonl: holds answers under other settings \({name}: "
        ):
            evaluate(policy, **ask, **changed)
    other_data = write_parquet(
        tmp_path / "other.parquet", [cvbench_row(0, prompt="Else?")], CVBENCH
    )
    with pytest.raises(UserError, match="row 0 of the data is another question"):
        evaluate(base, **ask | {"data": other_data})
    assert (tmp_path / "cvbench.jsonl").read_bytes() == before
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match="other settings"):
        evaluate(base, **ask)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0], "{torn", lines[1]],
        lambda lines: [lines[0], lines[0]],
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
    assert fingerprint(base) == fingerprint(load_model(base_path))
    assert (
        len(
            {fingerprint(base), fingerprint(policy), fingerprint(load_model(base_path, "bfloat16"))}
        )
        == 3
    )


@pytest.mark.parametrize(
    ("name", "value"), [("limit", 0), ("batch_size", 0), ("max_completion_length", 0)]
)
def test_impossible_numbers(base, files, name, value):
    with pytest.raises(UserError, match=f"--{name} {value}: must be at least 1"):
        evaluate(base, "blink", files["blink"], **{name: value})


# --------------------------------------------------------------------------------------- ranks


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.values = (
            size,
            threading.Barrier(size, timeout=60),
            [None] * size,
        )

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
    both = group.run(
        lambda n: evaluate(base, **ask, output=tmp_path / "two", ranks=group.rank(n, base.device))
    )
    assert both == [alone, alone]
    assert sorted(oracle.calls) == [1, 1, 2, 2]
    one, two = (tmp_path / name / "cvbench.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_an_error_of_one_rank_is_everyones(oracle, base, tmp_path):
    rows = [
        cvbench_row(0),
        cvbench_row(1, image=image(1) | {"bytes": b"no picture"}),
        cvbench_row(2),
    ]
    data = write_parquet(tmp_path / "test.parquet", rows, CVBENCH)
    group = Threads(2)
    errors = group.run(lambda n: evaluate(base, "cvbench", data, ranks=group.rank(n, base.device)))
    print(errors)
    assert all(isinstance(error, UserError) for error in errors)
    assert [str(error) for error in errors] == [
        f"{data}, row 1 (counted from 0): not an image of any known format"
    ] * 2
    (tmp_path / "out").write_text("a file where the folder should be")
    errors = group.run(
        lambda n: evaluate(
            base, "cvbench", data, 1, output=tmp_path / "out", ranks=group.rank(n, base.device)
        )
    )
    assert [str(error).split(":")[0] for error in errors] == [str(tmp_path / "out")] * 2


@pytest.mark.slow
def test_two_processes(files, tmp_path):
    """torchrun starts the installed command; the file is the one that a single process writes."""
    command = ["eval", "--model", "tiny-spatial-base", *flags(files, "--batch_size", "2")]
    assert main([*command, "--output_dir", str(tmp_path / "one")]) == 0
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--no-python",
    ]
    program = [
        sys.executable,
        "-c",
        "import sys; from vtfast.cli import main; sys.exit(main(sys.argv[1:]))",
    ]
    done = subprocess.run(
        [*launcher, *program, *command, "--device", "cpu", "--output_dir", str(tmp_path / "two")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("CV-Bench") == 1, "one table"
    for bench in files:
        one, two = (
            tmp_path / n / "evaluations" / "tiny-spatial-base" / f"{bench}.jsonl"
            for n in ("one", "two")
        )
        assert one.read_bytes() == two.read_bytes()


# ----------------------------------------------------------------------------------- checkpoints


def test_what_a_model_stands_for(run_folder, base_path, monkeypatch, tmp_path):
    step = run_folder / "checkpoints" / "step-100"
    shutil.copytree(base_path, run_folder / "checkpoints" / "step-20")
    (run_folder / "checkpoints" / "step-200").mkdir()  # torn: no model in it
    (run_folder / "checkpoints" / ".step-300.partial").mkdir()
    for name in (step, run_folder / "checkpoints" / "last", run_folder):
        found = find_checkpoint(str(name))
        assert (found.path, found.name, found.home, found.step) == (
            str(step),
            "step-100",
            run_folder,
            100,
        )
        assert found.config["max_pixels"] == 784
    (run_folder / "checkpoints" / "last").symlink_to("step-20")
    assert find_checkpoint(str(run_folder)).step == 20
    gone = find_checkpoint(str(run_folder / "checkpoints" / "step-7"))
    assert (gone.step, gone.home) == (7, run_folder)

    monkeypatch.chdir(tmp_path)
    elsewhere = shutil.copytree(base_path, tmp_path / "step-5")
    assert (find_checkpoint("step-5").name, find_checkpoint("step-5").step) == ("step-5", None)
    assert find_checkpoint(str(elsewhere)).home == Path()
    hub = find_checkpoint("Qwen/Qwen2-VL-2B")
    assert (hub.path, hub.name, hub.step) == ("Qwen/Qwen2-VL-2B", "Qwen2-VL-2B", None)
    assert find_checkpoint("tiny-spatial-base").path == str(base_path)
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    (empty / "config.yaml").write_text("template: r1-zero")
    with pytest.raises(UserError, match=r"there is no checkpoint \(step-N\) in"):
        find_checkpoint(str(empty))


@pytest.mark.parametrize(
    ("trained_with", "chat", "template"),
    [
        ("r1-zero", "<|im_start|>", "eval-r1-zero"),
        ("brief", None, "eval-r1-zero"),
        ("instruct", None, "eval-instruct"),
        ("eval-r1-zero-direct", None, "eval-r1-zero-direct"),
        ("eval-instruct-direct", None, "eval-instruct-direct"),
        (None, "…<|im_start|>…", "eval-instruct"),
        (None, "{{ messages }}", "eval-r1-zero"),
        (None, {"default": "{{ messages }}", "instruct": "<|im_start|>"}, "eval-r1-zero"),
        (None, None, "eval-r1-zero"),
    ],
)
def test_the_default_template(trained_with, chat, template, run_folder):
    (run_folder / "config.yaml").write_text(
        yaml.safe_dump({"template": trained_with, "model": "x"})
    )
    assert default_template(find_checkpoint(str(run_folder)), chat) == template


# ----------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def evaluated(files, tmp_path_factory, base_path):
    """`vtfast eval` of a run's checkpoint on all benchmarks -> (run folder, what it printed)."""
    run = tmp_path_factory.mktemp("run")
    shutil.copytree(base_path, run / "checkpoints" / "step-100")
    (run / "config.yaml").write_text(
        yaml.safe_dump(
            {"template": "r1-zero", "literal_image": True, "min_pixels": 784, "max_pixels": 784}
        )
    )
    command = [
        "eval",
        "--model",
        str(run / "checkpoints" / "last"),
        *flags(files),
        "--batch_size",
        "3",
    ]
    assert main(command) == 0
    return run, command


def test_every_benchmark_through_the_command(evaluated, files, capsys):
    run, _ = evaluated
    folder = run / "evaluations" / "step-100"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"{bench}.jsonl" for bench in files), "scores.json", "settings.json"]
    )
    scores = json.loads((folder / "scores.json").read_text())
    assert set(COUNTS) == set(BENCHMARKS)
    for bench, count in COUNTS.items():
        rows, result = rows_of(folder / f"{bench}.jsonl"), scores[bench]
        assert [row["index"] for row in rows] == list(range(count))
        assert list(rows[0]) == [
            *(
                "index",
                "task",
                "source",
                "question",
                "options",
                "gold",
                "images",
                "response",
                "correct",
                "strict_correct",
            ),
            *("tokens", "finish_reason"),
        ]
        assert result["count"] == count and result["step"] == 100 and result["max_pixels"] == 784
        assert result["template"] == "eval-r1-zero" and result["model"].endswith("checkpoints/last")
        assert result["total"] == sum(row["correct"] for row in rows) / count
        assert result["strict"]["total"] == sum(row["strict_correct"] for row in rows) / count
        assert all(0 < row["tokens"] <= 12 for row in rows) and result["truncated"] <= 1
        assert set(result["by_task"]) == {row["task"] for row in rows}
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["vsr"]["literal_image"] is True and settings["vsr"]["max_pixels"] == 784


def test_rescoring_needs_neither_model_nor_data(evaluated, tmp_path, capsys):
    run, _ = evaluated
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-100")
    (copy / "checkpoints" / "step-100").mkdir()
    scores = copy / "evaluations" / "step-100" / "scores.json"
    before = json.loads(scores.read_text())
    scores.unlink()
    model = str(copy / "checkpoints" / "step-100")
    assert main(["eval", "--model", model, "--rescore"]) == 0
    table = capsys.readouterr().out
    after = json.loads(scores.read_text())
    for bench, result in before.items():
        assert after[bench] == result | {"model": model}
    assert all(benchmark.title in table for benchmark in BENCHMARKS.values()) and "59.47" in table
    (copy / "evaluations" / "step-100" / "blink.jsonl").unlink()
    assert main(["eval", "--model", model, "--rescore", "--bench", "vsr,blink"]) == 2
    assert "there is no blink.jsonl in" in capsys.readouterr().err


def test_a_second_call_asks_nothing(evaluated, capsys, caplog, monkeypatch):
    run, command = evaluated
    monkeypatch.setattr(evaluation._Asker, "answer", None)
    before = {path.name: path.read_bytes() for path in (run / "evaluations" / "step-100").iterdir()}
    assert main(command) == 0
    assert before == {
        path.name: path.read_bytes() for path in (run / "evaluations" / "step-100").iterdir()
    }
    # what a run that trained with a prompt of its own needs to know
    assert "the template eval-r1-zero (the run trained with r1-zero)" in caplog.text
    assert main([*command, "--max_pixels", "1568"]) == 2
    assert (
        "cvbench.jsonl: holds answers under other settings (max_pixels: 784 there, 1568 now)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bench", "cvbensh"], "did you mean cvbench"),
        (["--bench", ","], "name at least one"),
        (["--data", "cvbench"], "BENCH=PATH"),
        (["--data", "blink=x"], "add it with --bench cvbench,blink"),
        (["--data", "blimk=x"], "one of cvbench"),
        (["--data", "cvbench={tmp}/gone.parquet"], "gone.parquet"),
        (["--data", "cvbench=nobody/CV-Bench"], "--data cvbench=PATH"),
        (["--template", "eval-r2"], "did you mean"),
        (["--limit", "0"], "--limit 0"),
        (["--limt", "3"], "did you mean --limit"),
        (["--max_pixels", "1"], "max_pixels 1"),
        (["--model", "{tmp}/no-model"], "no-model"),
        (["--model", "nobody/no-such-model"], "nobody/no-such-model"),
        (["--output_dir", "{tmp}/file"], "file"),
        (["--rescore"], "there is no cvbench.jsonl"),
    ],
)
def test_a_mistake_costs_one_line(more, message, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    given = [
        "eval",
        "--model",
        "tiny-spatial-base",
        "--bench",
        "cvbench",
        "--data",
        f"cvbench={files['cvbench']}",
    ]
    assert main([*given, *(flag.format(tmp=tmp_path) for flag in more)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
    with pytest.raises(UserError, match="row 1 of the data is another question"):
        evaluate(base, "blink", tmp_path / "data", **settings)


def test_rescoring_mends_the_rows_as_well(evaluated, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(evaluated[0], copy)
    path = copy / "evaluations" / "step-100" / "vsr.jsonl"
    rows = rows_of(path)
    rows[0] |= {"response": f"<answer>{rows[0]['gold']}</answer>"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(copy / "checkpoints" / "step-100")
    assert main(["eval", "--model", model, "--rescore", "--bench", "vsr"]) == 0
    mended = rows_of(path)
    assert mended[0]["correct"] and mended[0]["strict_correct"] and mended[1:] == rows[1:]


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
    with pytest.raises(
        UserError, match=r"test\.parquet, row 2 \(counted from 0\): (corrupt|not a readable) image"
    ):
        evaluate(
            base,
            "cvbench",
            tmp_path / "test.parquet",
            template="eval-r1-zero",
            batch_size=1,
            **settings,
        )
    assert not (tmp_path / "out" / "cvbench.jsonl").exists()
