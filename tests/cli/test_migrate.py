"""`vtfast migrate`: settings of TRL, R1-V, VisualThinker and EasyR1 -> ours."""

import pytest
import yaml

from vtfast.cli.main import main
from vtfast.cli.migration import migrate
from vtfast.cli.migration.name_tables import COUNTED, DEFAULTS, EASYR1, TRL
from vtfast.config import Config, field_names, load_config
from vtfast.utils.errors import UserError

VISUALTHINKER = """
export DEBUG_MODE="true"   # a launch script as people have them
OUT=outputs/sat
CUDA_VISIBLE_DEVICES=0,1,2,3 accelerate launch --config_file=zero2.yaml --num_processes=4 \\
    src/open_r1/grpo.py --output_dir ${OUT} --model_name_or_path Qwen/Qwen2-VL-2B --dataset_name SAT \\
    --max_prompt_length 1024 --max_completion_length 700 --per_device_train_batch_size 1 \\
    --gradient_accumulation_steps 2 --logging_steps 1 --bf16 --gradient_checkpointing 1 \\
    --attn_implementation flash_attention_2 --max_pixels 401408 --num_train_epochs 2 \\
    --run_name $RUN_NAME --save_steps 100 --save_only_model true --report_to wandb
"""


def test_visualthinkers_launch_script_becomes_its_recipe(tmp_path):
    """The recipe was written by hand; its number of steps is the paper's, and not the script's."""
    script = tmp_path / "run.sh"
    script.write_text(VISUALTHINKER)
    ours = migrate(str(script), rows=15000)
    recipe = load_config("visualthinker-2b-sat")
    mine = Config(**{**ours.settings, "recipe": recipe.recipe})
    differing = {name for name, value in recipe if value != getattr(mine, name)}
    assert differing == {"max_steps", "output_dir", "report_to", "dtype", "save_total_limit"}
    assert mine.max_steps == 2 * 15000 // 8
    assert mine.output_dir == "outputs/sat"
    dropped = {outcome.name: outcome.note for outcome in ours.outcomes if not outcome.to}
    assert dropped["logging_steps"] == "every step is logged"
    assert any("RUN_NAME" in name for name in dropped), "a variable that the script does not set is told"


def test_trl_counts_completions_and_we_prompts():
    line = "torchrun --nproc_per_node 8 grpo.py --per_device_train_batch_size 16 --gradient_accumulation_steps 4"
    ours = migrate(f"{line} --num_generations 8 --learning_rate 1e-6").settings
    assert ours["per_device_train_batch_size"] * ours["gradient_accumulation_steps"] == 16 * 4 // 8
    assert (ours["num_processes"], ours["learning_rate"]) == (8, 1e-6)
    odd = migrate("python grpo.py --per_device_train_batch_size 4 --num_generations 8")
    assert odd.settings["gradient_accumulation_steps"] == 1
    assert any("0.5 prompts per rank rounded up" in outcome.note for outcome in odd.outcomes)


@pytest.mark.parametrize("words", ['"q_proj", "v_proj"', "q_proj v_proj", "q_proj,v_proj", "'q_proj, v_proj'"])
def test_modules_stand_between_blanks_or_commas(words):
    """The first is how TRL's own examples write it."""
    ours = migrate(f"python grpo.py --use_peft --lora_target_modules {words}").settings
    assert ours["lora_target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "tail", ["2>&1 | tee log.txt", "> log.txt 2>&1 &", "&>>log.txt", "&& echo done", "< /dev/null"]
)
def test_what_the_shell_makes_of_a_line_is_no_value(tail):
    line = f"export X=1 && python grpo.py --beta 0.1 --num_generations 4 {tail}"
    result = migrate(line)
    assert (result.settings["beta"], result.settings["num_generations"]) == (0.1, 4)
    assert not any(outcome.note == "not a setting" for outcome in result.outcomes)


def test_trls_own_command():
    ours = migrate("trl grpo --model_name_or_path Qwen/Qwen2-VL-2B --num_processes 4 --beta 0.1").settings
    assert (ours["model"], ours["num_processes"], ours["beta"]) == ("Qwen/Qwen2-VL-2B", 4, 0.1)


@pytest.mark.parametrize(
    ("theirs", "kept"), [("constant", "constant"), ("cosine_with_min_lr", "cosine"), ("polynomial", None)]
)
def test_schedules_that_are_not_here_are_told(theirs, kept):
    result = migrate(f"python grpo.py --lr_scheduler_type {theirs} --beta 0.1")
    assert result.settings.get("lr_scheduler_type") == kept
    (outcome,) = (outcome for outcome in result.outcomes if outcome.name == "lr_scheduler_type")
    assert bool(outcome.note) == (theirs != kept)


def test_easyr1s_launch_line_stands_on_its_config():
    """What `examples/config.yaml` says and the line does not; lengths above all, which decide what is cut off."""
    line = "python3 -m verl.trainer.main config=examples/config.yaml data.max_prompt_length=1024"
    result = migrate(f"{line} worker.actor.model.model_path=Qwen/Qwen2.5-VL-7B-Instruct")
    ours = result.settings
    assert (ours["max_prompt_length"], ours["max_completion_length"]) == (1024, 2048)
    assert (ours["min_pixels"], ours["max_pixels"]) == (512 * 512, 2048 * 2048)


def test_trls_correction_comes_with_vllm():
    assert migrate("python grpo.py --use_vllm").settings["vllm_importance_sampling_correction"]
    assert "vllm_importance_sampling_correction" not in migrate("python grpo.py --beta 0").settings


def test_what_trl_does_when_nothing_is_said_is_written_down():
    from dataclasses import fields

    trl = pytest.importorskip("trl")
    defaults = {field.name: field.default for field in fields(trl.GRPOConfig)}
    ours = Config()
    for name, value in DEFAULTS["trl"].items():
        theirs = defaults[name]
        assert value == ([theirs] if name == "report_to" else theirs), name
    shared = set(defaults) & set(field_names()) & set(TRL) - set(DEFAULTS["trl"]) - COUNTED
    same_by_meaning = {
        "max_steps",
        "output_dir",
        "top_k",
        "bf16",
        "use_liger_kernel",
        "vllm_enable_sleep_mode",
        "min_p",
    }
    same_by_meaning |= {"vllm_importance_sampling_correction", "save_steps", "resume_from_checkpoint"}
    for name in shared - same_by_meaning:
        assert defaults[name] == getattr(ours, name), f"{name}: TRL's default differs and is not in DEFAULTS"


def test_every_rule_names_a_setting_of_ours():
    for table in (TRL, EASYR1):
        for name, rule in table.items():
            if isinstance(rule, str):
                assert hasattr(Config(), rule), name


def test_easyr1s_yaml(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "data": {"train_files": "me/math@train", "prompt_key": "problem", "max_response_length": 2048},
                "algorithm": {"disable_kl": False, "kl_penalty": "low_var_kl", "kl_coef": 0.02},
                "worker": {
                    "actor": {
                        "global_batch_size": 128,
                        "model": {"model_path": "Qwen/Qwen2.5-VL-3B-Instruct", "freeze_vision_tower": True},
                        "optim": {"lr": 1e-6, "lr_warmup_ratio": 0.1},
                        "fsdp": {"enable_full_shard": True},
                    },
                    "rollout": {"n": 5, "temperature": 1.0, "top_p": 0.99},
                },
                "trainer": {"total_epochs": 2, "n_gpus_per_node": 8, "save_freq": 5, "save_limit": -1},
            }
        )
    )
    result = migrate(str(file), rows=6400)
    ours = result.settings
    assert (ours["data"], ours["split"], ours["question_column"]) == ("me/math", "train", "problem")
    assert (ours["beta"], ours["freeze"], ours["num_generations"]) == (0.02, ["vision"], 5)
    assert ours["gradient_accumulation_steps"] * 8 == 128
    assert (ours["max_steps"], ours["warmup_steps"]) == (100, 10)
    assert "save_total_limit" not in ours
    assert (ours["epsilon_high"], ours["delta"]) == (0.3, 3.0), "its defaults"
    assert {outcome.name: outcome.note for outcome in result.outcomes}[
        "worker.actor.fsdp.enable_full_shard"
    ].startswith("ZeRO-2")


def test_epochs_without_rows_are_told_and_unknown_names_are_dropped_with_the_nearest():
    result = migrate("python grpo.py --num_train_epochs 3 --num_generation 4 --frobnicate 1")
    notes = {outcome.name: outcome.note for outcome in result.outcomes}
    assert notes["num_train_epochs"] == "epochs need --rows, see the warning"
    assert notes["num_generation"] == "unknown here; is num_generations meant?"
    assert notes["frobnicate"] == "unknown here"
    assert "max_steps" not in result.settings


UNKNOWN_STEPS = (
    "max_steps stays at the default of 200, whatever the data. Give --rows ROWS, the number of rows of the data"
    " set, and it becomes 3 epochs x ROWS / 2 prompts per step: --rows 10000 makes it 15000"
)


@pytest.mark.parametrize("epochs", ["", " --num_train_epochs 3"])
def test_the_way_to_max_steps_is_the_last_that_is_said(epochs, tmp_path, capsys):
    line = f"python grpo.py --num_generations 4 --per_device_train_batch_size 8{epochs} --warmup_ratio 0.1"
    assert main(["migrate", line]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == f"warning: {UNKNOWN_STEPS}"
    assert printed.out.splitlines()[1] == f"# Warning: {UNKNOWN_STEPS}"
    assert "max_steps" not in yaml.safe_load(printed.out)
    out = tmp_path / "mine.yaml"
    assert main(["migrate", line, "--output", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"warning: {UNKNOWN_STEPS}"
    assert f"# Warning: {UNKNOWN_STEPS}\n" in out.read_text()
    assert load_config(file=out).max_steps == 200

    assert main(["migrate", line, "--rows", "10000"]) == 0
    printed = capsys.readouterr()
    assert "arning" not in printed.out + printed.err
    ours = yaml.safe_load(printed.out)
    assert (ours["max_steps"], ours["warmup_steps"]) == (15000, 1500)


def test_visualthinkers_rows_are_known_from_its_code(tmp_path):
    (warning,) = migrate("python src/open_r1/grpo.py --dataset_name SAT").warnings
    assert warning.endswith(" 3 epochs x ROWS / 8 prompts per step: --rows 15000 makes it 5625")


@pytest.mark.parametrize("words", [["--max_steps", "7"], ["--max_steps", "7", "--num_train_epochs", "2"]])
def test_nothing_is_warned_of_where_max_steps_is_said(words):
    assert migrate(" ".join(["python grpo.py", *words])).warnings == []


def test_mistakes_are_told_at_once_and_leave_nothing(tmp_path, capsys):
    line, out = "python grpo.py --beta 0", tmp_path / "gone" / "mine.yaml"
    assert main(["migrate", line, "--rows", "0", "--from", "trll", "--output", str(out)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "error: 3 problems:",
        "  --rows 0: must be at least 1",
        "  --from trll: must be one of trl, r1-v, easyr1",
        f"  --output {out}: {out.parent} is not a folder; make it, or name another",
    ]
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_file_that_train_takes(tmp_path, capsys):
    source, out = tmp_path / "trl.yaml", tmp_path / "mine.yaml"
    source.write_text("num_generations: 4\nlearning_rate: 1.0e-5\nbf16: false\nmax_steps: 7\n")
    assert main(["migrate", str(source), "--output", str(out)]) == 0
    assert "next: python train.py --config" in capsys.readouterr().out
    config = load_config(file=out)
    assert (config.num_generations, config.max_steps, config.dtype) == (4, 7, "float32")
    assert main(["migrate", str(source), "--output", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["migrate", str(source)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["max_steps"] == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing.yaml", "no such file"),
        ("", "is a folder"),
        ("python grpo.py --beta two", "beta"),
        ("python grpo.py --max_steps many", "'many' is not a valid value"),
        ("python grpo.py --per_device_train_batch_size x", "'x' is not a number"),
        ("echo --hello 1", "holds no settings"),
        ("python grpo.py --beta 'open", "cannot be read as shell words"),
        ("python grpo.py --beta -1", "must not be negative"),
    ],
)
def test_what_cannot_be_read_is_one_line(text, message):
    with pytest.raises(UserError, match=message):
        migrate(text)


def test_files_that_are_no_settings(tmp_path):
    for name, content in (("a.yaml", "- 1\n"), ("b.yaml", "a: [1\n"), ("c.yaml", ""), ("d.sh", "echo\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError):
            migrate(str(tmp_path / name))
    (tmp_path / "e.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        migrate(str(tmp_path / "e.yaml"))
