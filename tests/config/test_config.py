"""Settings: recipes as data, flags on top, and mistakes that are named."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vtfast.config import (
    LOSS_TYPES,
    Config,
    SFTConfig,
    field_defaults,
    field_help,
    field_names,
    field_sections,
    load_config,
    recipe_names,
)
from vtfast.rewards import REWARDS
from vtfast.utils.errors import UserError

ROOT = Path(__file__).parents[2]

# arXiv 2503.05132, Table 2, and the authors' run_grpo_SAT.sh (defaults of its TRL 0.14 and transformers 4.49 included).
PAPER = {
    "model": "Qwen/Qwen2-VL-2B",
    "data": "array/SAT",
    "first_n": 15000,
    "first_rows": 15000,
    "static": True,
    "template": "r1-zero",
    "literal_image": True,
    "reward_mode": "recipe",
    "num_processes": 4,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": 1500,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "temperature": 1.0,
    "max_completion_length": 700,
    "max_prompt_length": 1024,
    "num_generations": 8,
    "beta": 0.04,
    "loss_type": "grpo",
    "scale_rewards": "group",
    "reward_funcs": ["accuracy", "format"],
    "reward_weights": None,
    "min_pixels": 3136,
    "max_pixels": 401408,
    "gradient_checkpointing": True,
    "save_steps": 100,
}


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_recipe_has_the_papers_value(name):
    assert getattr(load_config("visualthinker-2b-sat"), name) == PAPER[name]


def test_every_recipe_loads_and_survives_a_round_trip(tmp_path):
    for name in recipe_names():
        config = load_config(name)
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert load_config(file=tmp_path / "config.yaml") == config


def test_flags_override_the_recipe_and_are_read_as_their_type():
    config = load_config(overrides={"beta": "0.1", "first_n": "7", "freeze": "vision,merger", "eval_data": "none"})
    assert (config.beta, config.first_n, config.freeze, config.eval_data) == (0.1, 7, ["vision", "merger"], None)


def test_every_field_has_a_docstring():
    described = field_help()
    assert [name for name in field_names() if not described.get(name)] == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_generation": 4}, "num_generations"),
        ({"beta": "much"}, "--beta much: must be a finite number"),
        ({"beta": "nan"}, "--beta nan"),
        ({"temperature": "inf"}, "--temperature inf"),
        ({"reward_weights": "nan,1"}, "--reward_weights nan"),
        ({"lr_scheduler_type": "foo"}, "cosine"),
        ({"adam_beta1": 1.5}, "below 1"),
        ({"delta": -1}, "--delta -1"),
        ({"sparse_tau": 1.0}, "--sparse_tau 1.0: must be at least 0 and below 1"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "use token"),
        ({"num_generations": "2.5"}, "--num_generations 2.5: must be a whole number"),
        ({"num_generations": 1}, "group of one"),
        ({"num_generations": 1, "scale_rewards": "none"}, "group of one"),
        ({"offload_reference": True}, "no copy to move"),
        ({"use_peft": True, "freeze": "vision"}, "--freeze: has no effect with --use_peft"),
        ({"use_peft": True, "lora_target_modules": ""}, "name at least one linear layer"),
        ({"epsilon_high": -3}, "--epsilon_high -3.0: must not be negative"),
        ({"first_rows": 0}, "--first_rows 0: must be at least 1"),
        ({"top_k": -1}, "--top_k -1: must not be negative"),
        ({"top_p": 0.0}, "--top_p 0.0: must be above 0"),
        ({"min_p": 1.5}, "--min_p 1.5: must be at least 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty 0.0: must be above 0"),
        ({"token_budget": 0}, "--token_budget 0: must be at least 1"),
        ({"attn_implementation": "flash"}, "--attn_implementation flash: must be one of auto"),
        ({"num_generations": 0}, "at least 1"),
        ({"temperature": 0}, "--temperature"),
        ({"loss_type": "ppo"}, "dr_grpo"),
        ({"freeze": "eyes"}, "embeddings"),
        ({"gradient_checkpointing": "maybe"}, "true or false"),
        ({"reward_weights": "1,2,3"}, "3 weights for 2 rewards"),
        ({"max_pixels": 100}, "smaller than --min_pixels"),
        ({"report_to": "excel"}, "tensorboard"),
        ({"max_steps": True}, "--max_steps True: must be a whole number"),
        ({"max_steps": "8.0"}, "--max_steps 8.0: must be a whole number"),
        ({"model": None}, "--model None: must be text"),
        ({"seed": -1}, "--seed -1: must not be negative"),
        ({"seed": 2**32}, "of at most 4294967295"),
        ({"freeze": [["vision"]]}, "must be a flat list"),
        ({"loss_type": "sapo", "delta": 2}, "--delta: has no effect with --loss_type sapo"),
        ({"loss_type": "vespo", "epsilon": 0.1}, "--epsilon: has no effect with --loss_type vespo"),
        ({"lora_r": 8}, "--lora_r: has no effect without --use_peft true"),
        ({"vllm_gpu_memory_utilization": 0.5}, "has no effect without --use_vllm true"),
        ({"vllm_importance_sampling_mode": "token_mask"}, "without --vllm_importance_sampling_cor"),
        ({"use_vllm": True, "rollout_max_rows": 8}, "has no effect with --use_vllm true"),
        ({"min_pixels": 10**6, "max_pixels": 10**7}, "the smallest image takes 1278 tokens"),
        ({"reward_funcs": "accuracy,format,accuracy"}, "--reward_funcs accuracy: is named twice"),
        ({"question_types": ""}, "--question_types: name at least one"),
        ({"recipe": "../elsewhere"}, "must not hold slashes"),
    ],
)
def test_a_mistake_is_named_with_what_would_do(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(overrides=overrides)


def test_a_setting_is_refused_only_where_it_is_silenced():
    """The same settings beside the switch or the loss that hears them."""
    load_config(overrides={"loss_type": "luspo", "delta": 2, "epsilon_high": 0.1})
    load_config(overrides={"loss_type": "cispo", "epsilon_high": 5})
    load_config(overrides={"use_peft": True, "lora_r": 8})
    load_config(overrides={"use_vllm": True, "vllm_gpu_memory_utilization": 0.5})
    load_config(overrides={"min_pixels": 28 * 28 * 100, "max_prompt_length": 103})
    load_config(overrides={"seed": 2**32 - 1})
    with pytest.raises(UserError, match="--max_prompt_length 102: the smallest image takes 102"):
        load_config(overrides={"min_pixels": 28 * 28 * 100, "max_prompt_length": 102})


def test_what_may_not_be_meant_is_a_warning():
    assert load_config(overrides={"warmup_steps": 5, "max_steps": 6}).warnings() == []
    (warning,) = load_config(overrides={"warmup_steps": 5, "max_steps": 5}).warnings()
    assert "--warmup_steps 5: the learning rate does not reach its peak" in warning
    assert load_config("tiny-spatial-sft", kind=SFTConfig).warnings() == []  # max_steps: none
    (warning,) = load_config(overrides={"data": "mine.jsonl"}).warnings()
    assert "--eval_data synthetic: the held-out questions are the demo's" in warning
    assert load_config(overrides={"data": "mine.jsonl", "eval_data": "none"}).warnings() == []


def test_all_impossible_settings_are_named_at_once():
    with pytest.raises(UserError) as caught:
        load_config(overrides={"temperature": -1, "max_steps": 0, "loss_type": "x"})
    assert all(flag in str(caught.value) for flag in ("--temperature", "--max_steps", "--loss_type"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "lerning_rate: 1\n", "\x00"])
def test_a_bad_file_is_named(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load_config(file=file)
    with pytest.raises(UserError, match=r"gone\.yaml"):
        load_config(file=tmp_path / "gone.yaml")


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean visualthinker-2b-sat"):
        load_config("visualthinker-2b")


def test_every_loss_type_is_in_its_help_and_in_the_pages():
    """Nobody else would notice a new one that is missing there."""
    table = (ROOT / "docs/pages/loss.md").read_text().partition("## The family")[2]
    told = field_help(Config)["loss_type"]
    for name in LOSS_TYPES:
        assert re.search(rf"\b{name}\b", told), name
        assert re.search(rf"^\|[^|]*\b{name}\b", table, re.MULTILINE), name


def test_every_reward_is_in_its_help():
    assert f"({', '.join(REWARDS)})" in field_help(Config)["reward_funcs"]


def test_settings_are_checked_before_torch_is_loaded():
    there = "'torch' in sys.modules"  # where torchvision has to be mended, `import vtfast` brings it
    code = f"import sys, vtfast; had = {there}; import vtfast.config; assert ({there}) == had"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_setting_is_read():
    """Outside its section and its checks: one that nothing reads is a promise that nobody keeps."""
    others = ("config", "migrate")
    files = [file for file in (ROOT / "vtfast").rglob("*.py") if file.parent.name not in others]
    code = "\n".join(file.read_text("utf-8") for file in files)
    read = set(re.findall(r"\bconfig\.(\w+)", code))
    # Properties of the settings read these two.
    assert {"tokens_per_micro_batch", "prompts_per_rank"} <= read
    assert {*field_names(Config), *field_names(SFTConfig)} - read == {"token_budget", "gradient_accumulation_steps"}


@pytest.mark.parametrize("kind", [Config, SFTConfig])
def test_defaults_are_written_as_flags_read_them(kind):
    """The help shows them; given as flags they change nothing."""
    assert load_config(overrides=field_defaults(kind), kind=kind) == kind()


@pytest.mark.parametrize("kind", [Config, SFTConfig])
def test_every_setting_is_in_one_section(kind):
    sections = field_sections(kind)
    listed = [name for names in sections.values() for name in names]
    assert sorted(listed) == sorted(field_names(kind)) and all(map(len, sections.values()))
