"""The recipes that ship: every one can be run as it is, and says of its original what its original says."""

import pytest
import yaml

from vtfast.config import RECIPES, load_config, recipe_names
from vtfast.data import Sample
from vtfast.data.prompt_templates import load_template, render
from vtfast.rewards import get_reward
from vtfast.utils.errors import UserError

STUDY = [name for name in recipe_names() if name.startswith("visualthinker-2b-sat-")]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_names_what_there_is(name):
    """Its template renders a question with options and one without, and its rewards exist."""
    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# "), "a recipe names its source"
    config = load_config(name)
    assert config.recipe == name
    for options in (["a", "b"], []):
        asked = Sample("Which?", options, "a", [])
        assert "Which?" in render(load_template(config.template), asked)
    for reward in getattr(config, "reward_funcs", []):
        assert callable(get_reward(reward))


def differs(name: str, base: str) -> dict:
    """Settings of a recipe that are not its base's."""
    one, other = (load_config(recipe).model_dump() for recipe in (name, base))
    return {key: value for key, value in one.items() if value != other[key] and key != "recipe"}


INSTRUCT = {"model": "Qwen/Qwen2-VL-2B-Instruct", "template": "instruct"}
ABLATIONS = {  # arXiv 2503.05132, section 5: Tables 4 and 5 and Figure 5 are all about the instruction-tuned model
    "visualthinker-2b-sat-direct": {"template": "r1-zero-direct"},
    "visualthinker-2b-sat-instruct": INSTRUCT,
    "visualthinker-2b-sat-instruct-answer": INSTRUCT | {"template": "instruct-answer"},
    "visualthinker-2b-sat-instruct-freeze-language": INSTRUCT | {"freeze": ["language"]},
    "visualthinker-2b-sat-instruct-freeze-vision": INSTRUCT | {"freeze": ["vision", "merger"]},
    "visualthinker-2b-sat-instruct-length": INSTRUCT | {"reward_funcs": ["accuracy", "format", "length"]},
}


def test_an_ablation_differs_in_what_it_is_named_for():
    assert sorted(ABLATIONS) == STUDY
    for name, difference in ABLATIONS.items():
        assert differs(name, "visualthinker-2b-sat") == difference


LAUNCH_COMMANDS = {  # what the originals' own commands and reports say; the rest is TRL 0.14's
    "r1-v-clevr": {
        "model": "Qwen/Qwen2-VL-2B-Instruct",
        "data": "leonardPKU/clevr_cogen_a_train",
        "template": "r1-v",
        "max_prompt_length": 1024,
        "max_pixels": 401408,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_processes": 8,
        "gradient_checkpointing": False,
        "max_steps": 2 * 70_000 // 16,
        "save_steps": 100,
    },
    "r1-v-geoqa": {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "data": "leonardPKU/GEOQA_R1V_Train_8K", "template": "r1-v"},
    "open-r1-multimodal-8k": {
        "model": "Qwen/Qwen2-VL-2B-Instruct",
        "data": "lmms-lab/multimodal-open-r1-8k-verified",
        "template": "open-r1",
        "max_prompt_length": 8192,
        "max_pixels": 2359296,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_processes": 8,
        "gradient_checkpointing": True,
        "save_total_limit": 8,
    },
    "journey-geo170k": {
        "model": "Qwen/Qwen2.5-VL-3B-Instruct",
        "template": "open-r1",
        "max_prompt_length": 1024,
        "max_completion_length": 768,
        "max_pixels": 1_000_000,
        "num_generations": 8,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "num_processes": 7,
        "temperature": 0.9,
        "save_total_limit": 30,
    },
    "r1-zero-text": {"model": "Qwen/Qwen2.5-1.5B", "template": "r1-zero-text", "eval_split": "test"},
}


@pytest.mark.parametrize("name", LAUNCH_COMMANDS)
def test_a_relatives_recipe_has_its_values(name):
    config = load_config(name)
    for key, value in LAUNCH_COMMANDS[name].items():
        assert (key, getattr(config, key)) == (key, value)
    assert config.reward_funcs == ["accuracy", "format"]
    assert (config.num_generations, config.beta, config.learning_rate) == (8, 0.04, 1e-6)


# ------------------------------------------------------------------------------------- base


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Recipes of the test's own in place of the shipped ones."""
    monkeypatch.setattr("vtfast.config.load.RECIPES", tmp_path)

    def write(**recipes: dict):
        for name, settings in recipes.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))

    return write


def test_a_recipe_is_its_base_and_its_differences(shipped, tmp_path):
    shipped(
        one={"beta": 0.1, "max_steps": 7, "seed": 3}, two={"base": "one", "beta": 0.2}, three={"base": "two", "seed": 5}
    )
    config = load_config("three", overrides={"seed": "6"})
    assert (config.beta, config.max_steps, config.seed, config.recipe) == (0.2, 7, 6, "three")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "one.yaml").write_text("base: one\nbeta: 0.3\n")  # a file of the same name
    mine = load_config(file=tmp_path / "mine" / "one.yaml")
    assert (mine.beta, mine.max_steps) == (0.3, 7)


def test_a_base_that_is_not_there(shipped):
    shipped(two={"base": "onne"}, one={}, three={"base": 3})
    with pytest.raises(UserError, match=r"two\.yaml: base: onne: unknown; did you mean one\?"):
        load_config("two")
    with pytest.raises(UserError, match=r"three\.yaml: base: 3: unknown"):
        load_config("three")
