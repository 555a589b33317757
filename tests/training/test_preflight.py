"""What stops a run is told before its model is loaded, all of it at once."""

import json
import shutil

import pytest
import torch

from vtfast.config import SettingsError, SFTConfig, load_config
from vtfast.trainer import Trainer
from vtfast.training import preflight, setup
from vtfast.training.preflight import check_start, find_problems
from vtfast.training.sft import SFTTrainer


@pytest.fixture
def problems(random_path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def problems(kind=None, **overrides) -> list[str]:
        named = {"model": random_path, "output_dir": str(tmp_path / "run"), "warmup_steps": 0}
        return list(find_problems(load_config(overrides=named | overrides, **({"kind": kind} if kind else {}))))

    return problems


def test_the_embedded_default_has_none(problems):
    assert problems() == [] == problems(kind=SFTConfig)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"output_dir": "/"}, "--output_dir /: exists and is not empty"),
        ({"template": "r2-zero"}, "--template: unknown prompt template 'r2-zero'"),
        ({"template": "gone.txt"}, "--template: cannot read the prompt template: gone.txt"),
        ({"data": "gone.parquet"}, "--data: no such file or folder: gone.parquet"),
        ({"eval_data": "gone.jsonl"}, "--eval_data: no such file or folder: gone.jsonl"),
        ({"reward_funcs": "format,acuracy"}, "--reward_funcs: unknown reward 'acuracy'"),
        ({"reward_funcs": "no_such_module:f"}, "--reward_funcs: cannot load the reward"),
        ({"device": "cuda"}, "--device cuda: PyTorch sees no CUDA device"),
        ({"use_vllm": True}, "--use_vllm: not installed (pip install vllm)"),
        ({"output_dir": f"{__file__}/x"}, f"--output_dir {__file__}/x: {__file__} is not a folder"),
        ({"attn_implementation": "flash_attn"}, "--attn_implementation flash_attn: must be one of auto"),
        ({"rollout_attention": "triton"}, "--rollout_attention triton: must be one of auto"),
        ({"model": "nobody/no-such-model"}, "--model: nobody/no-such-model is no local path"),
        ({"freeze": "vision,merger,language"}, "--freeze vision,merger,language: nothing is left"),
        ({"use_peft": True, "lora_target_modules": "q_prj"}, "--lora_target_modules q_prj: the model has no"),
        ({"use_peft": True, "lora_target_modules": "lm_head"}, "--lora_target_modules lm_head: the head"),
        ({"max_prompt_length": 9}, "--max_prompt_length 9: --template brief and the smallest image"),
    ],
)
def test_a_problem_names_its_flag(problems, overrides, message):
    (problem,) = problems(**overrides)
    assert problem.startswith(message)


@pytest.mark.parametrize("version", ["0.18.3", "0.19.1", "0.19.7", "0.20.0"])
def test_another_deepspeed_is_refused(problems, monkeypatch, version):
    monkeypatch.setattr(preflight.metadata, "version", lambda name: version)
    assert problems() == [f"deepspeed {version}: pip install 'deepspeed>=0.19.8,<0.20'"]


def test_deepspeed_may_be_missing(problems, monkeypatch):
    def missing(name):
        raise preflight.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(preflight.metadata, "version", missing)
    (problem,) = problems()
    assert problem.startswith("deepspeed is not installed: pip install 'deepspeed>=0.19.8,<0.20'")


def test_a_machine_that_cannot_build_kernels(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    assert list(preflight._triton_problems(torch.device("cpu"))) == []
    monkeypatch.setattr(preflight, "silu_mul", no_compiler)
    (problem,) = preflight._triton_problems(torch.device("cpu"))
    assert problem.startswith("Triton cannot build a kernel (Failed to find C compiler.") and "python3-dev" in problem


def test_a_supervised_runs_target(problems):
    (problem,) = problems(kind=SFTConfig, target="{anwser}")
    assert problem.startswith("--target {anwser}: has no {answer}")


def test_the_cache_holds_one_group_at_its_limit(problems):
    limits = {"max_prompt_length": 100, "max_completion_length": 20, "num_generations": 4}
    least = (100 // 16 + 4 * 3) * 16  # full pages of the prompt; for each row its rest (15 at most) and 20 more
    assert problems(**limits, rollout_cache_tokens=least) == []
    (problem,) = problems(**limits, rollout_cache_tokens=least - 1)
    assert f"takes {least} tokens in pages of 16; raise it to {least}" in problem


def test_the_shortest_prompt_just_fits(problems, processor, tmp_path):
    template = tmp_path / "mine.txt"
    template.write_text("{images}How many? {question}\n")
    text = len(processor.tokenizer("How many? ", add_special_tokens=False)["input_ids"])
    least = text + 2 + 4  # the image's marks, and 56 x 56 pixels
    assert problems(template=template, max_prompt_length=least) == []
    (problem,) = problems(template=template, max_prompt_length=least - 1)
    assert f"take {least} tokens without any question" in problem
    # `<image>` in letters takes room as well
    template.write_text("{images}{literal_image}How many? {question}\n")
    assert problems(template=template, max_prompt_length=least) == []
    assert len(problems(template=template, max_prompt_length=least, literal_image=True)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "is a llama model; those of qwen2_vl"),
        ({"model_type": "no-such-type"}, "config.json: cannot be used (ValueError: The checkpoint"),
    ],
)
def test_a_config_json_that_will_not_do(problems, random_path, tmp_path, changes, message):
    folder = tmp_path / "model"
    shutil.copytree(random_path, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (problem,) = problems(model=folder)
    assert problem.startswith(f"--model {folder}: {message}")
    (folder / "config.json").write_text("{")
    assert problems(model=folder)[0].startswith(f"--model: {folder}/config.json: cannot be read")


@pytest.mark.parametrize(("trainer", "kind"), [(Trainer, None), (SFTTrainer, SFTConfig)])
def test_nothing_is_loaded_before_all_is_told(trainer, kind, monkeypatch, tmp_path):
    def load(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(setup, "load_model", load)
    overrides = {"data": "gone.parquet", "template": "r2", "freeze": "vision,merger,language"}
    config = load_config(overrides=overrides, **({"kind": kind} if kind else {}))
    with pytest.raises(SettingsError) as caught:
        trainer(config)
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "--template",
        "--data",
        "--freeze vision,merger,language",
    ]


def test_warnings_go_to_the_log(random_path, caplog):
    check_start(load_config(overrides={"model": random_path, "warmup_steps": 9, "max_steps": 9}))
    assert "--warmup_steps 9: the learning rate does not reach its peak" in caplog.text
