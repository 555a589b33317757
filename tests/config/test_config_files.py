"""Settings files: whatever they hold, settings come out or one error that names the file."""

import itertools

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vtfast.config import Config, SettingsError, field_names, load_config
from vtfast.utils.errors import UserError

BOMB = "a: &a [x, x]\n" + "".join(f"{n}: &{n} [*{m}, *{m}]\n" for m, n in itertools.pairwise("abcdefghi"))


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes):
        file = tmp_path / "mine.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a mapping"),
        ("- beta\n", "must be a mapping"),
        ("beta", "must be a mapping"),
        ("beta: [\n", "not valid YAML (line 2: "),
        ("\tbeta: 1\n", "line 1: found character '\\t' that cannot start any token; indent with spaces"),
        ("beta: 1\n--- \nbeta: 2\n", "several documents"),
        ("beta: \xff".encode("latin-1"), "can't decode byte 0xff in position 6"),
        ("beta: \x07\n", "not valid YAML"),
        (b"#" * (1 << 17), "longer than 65536 bytes"),
        ("[" * 50_000, "not valid YAML (line 1: nested too deeply)"),
        ("beta: " + "[" * 50_000, "not valid YAML (line 1: nested too deeply)"),
        ("beta: 1\nseed: 2\nbeta: 3\n", "line 3: beta: is set in line 1 already"),
        ("beta: {a: 1}\n", "mine.yaml:1: --beta (dict): must be a finite number"),
        ("freeze: [[vision]]\n", "mine.yaml:1: --freeze (list): must be a flat list"),
        ("seed: &s 1\nmax_steps: *s\n", "line 2: *s is an alias"),
        ("<<: &s {a: 1}\n", "line 1: a name must be text"),
        (BOMB, "line 2: *a is an alias"),
        ("seed: !!int '1'\n", "line 1: tag:yaml.org,2002:int is a tag"),
        ("seed: !!python/object/apply:os.getcwd []\n", "line 1: tag:yaml.org,2002:python/object"),
        ("[a, b]: 1\n", "line 1: a name must be text"),
        ("~: 1\n", "line 1: a name must be text"),
        ("seed: 2001-99-99\n", "mine.yaml:1: --seed 2001-99-99: must be a whole number"),
        ("seed: " + "9" * 5000 + "\n", "mine.yaml:1: --seed 9999"),
        ("seed: null\n", "mine.yaml:1: --seed None: must be a whole number"),
        ("seed: 4294967296\n", "a whole number of at most 4294967295"),
        ("max_steps: true\n", "--max_steps true: must be a whole number"),
        ("max_steps: 8.0\n", "--max_steps 8.0: must be a whole number"),
        ("max_steps: 1e3\n", "--max_steps 1e3: must be a whole number"),
        ("beta: 1e400\n", "--beta 1e400: must be a finite number"),
        ("beta: .nan\n", "--beta .nan: must be a finite number"),
        ("reward_weights: [1, ~]\n", "--reward_weights None: must be a finite number"),
        ("model: ''\n", "--model '': must be text, and not empty"),
        ('model: "a\\0b"\n', "must be text, and not empty"),
        ("lerning_rate: 1\n", "mine.yaml:1: --lerning_rate: unknown; did you mean --learning_rate?"),
    ],
)
def test_a_bad_file_costs_one_error(write, content, message):
    with pytest.raises(SettingsError) as caught:
        load_config(file=write(content))
    assert message in str(caught.value) and "mine.yaml" in str(caught.value)


@pytest.mark.parametrize("name", ["", "gone.yaml", "bad\0name.yaml", "x" * 300])
def test_a_path_that_cannot_be_read(tmp_path, name):
    with pytest.raises(UserError, match=r"--config .*(is a folder|cannot be used|no such file)"):
        load_config(file=f"{tmp_path}/{name}")


def test_yaml_and_flags_are_blamed_each_for_its_own(write):
    file = write("beta: much\nlerning_rate: 1\ntemperature: -1\ndelta: 2\nmax_steps: 0\n")
    flags = {"num_generatons": 4, "seed": "x", "loss_type": "cispo", "max_steps": 5}
    with pytest.raises(SettingsError) as caught:
        load_config(file=file, overrides=flags)
    assert caught.value.problems == [
        f"{file}:1: --beta much: must be a finite number",
        f"{file}:2: --lerning_rate: unknown; did you mean --learning_rate?",
        f"{file}:3: --temperature -1.0: must be above 0",
        "--num_generatons: unknown; did you mean --num_generations?",
        "--seed x: must be a whole number",
        f"{file}:4: --delta: has no effect with --loss_type cispo; leave it out",
    ]
    assert str(caught.value).startswith("6 problems:\n  ")


def test_a_refused_value_draws_no_blame_on_others():
    """The default that stands in for it is nobody's choice."""
    with pytest.raises(SettingsError) as caught:
        load_config(overrides={"use_peft": "maybe", "lora_r": 8, "offload_reference": "x"})
    assert caught.value.problems == [
        "--use_peft maybe: must be true or false",
        "--offload_reference x: must be true or false",
    ]
    with pytest.raises(SettingsError) as caught:  # whether the recipe sets a beta is not known
        load_config("no-such", overrides={"offload_reference": True, "temperature": 0})
    unknown, temperature = caught.value.problems
    assert unknown.startswith("--recipe no-such") and temperature.startswith("--temperature 0.0")


def test_yaml_words_are_read_as_yaml_has_them(write):
    config = load_config(
        file=write(
            "\ufeffstatic: yes\nuse_liger_kernel: off\neval_data: ~\nfreeze: [vision]\ntemplate: 'no'\n"
            "seed: 1_000\nlearning_rate: 1e-6\nreward_weights: [1, .5]\ndata: >-\n  a\n  b\n"
        )
    )
    assert config.static is True and config.use_liger_kernel is False and config.eval_data is None
    assert (config.freeze, config.template, config.seed) == (["vision"], "no", 1000)
    assert (config.learning_rate, config.reward_weights, config.data) == (1e-6, [1.0, 0.5], "a b")


# ------------------------------------------------------------------------------- any file, any value

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=4),
    st.builds(pow, st.just(10), st.just(5000)),
    st.sampled_from(["none", "null", "~", "true", "a,b", "1e400", "nan", "8.0", "=", "\ud800"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
PLAUSIBLE = {
    name: st.sampled_from(values)
    for name, values in {
        "beta": [0, 0.04, "1e-3", 1e20],
        "seed": [0, 2**32 - 1],
        "num_generations": [2, "8"],
        "epsilon_high": ["none", 0.3],
        "reward_funcs": ["accuracy", ["accuracy", "a:b c"]],
        "freeze": ["none", "vision,merger", []],
        "model": ["a b", "null", "1", "yes", "{x: 1}", "- x", "é\u2028", "#", "x" * 300],
        "eval_data": [None, "null", "~"],
        "question_types": [["none"], ["a,b", "null"], "x"],
        "static": ["on", False],
        "target": ["x"],
        "template": ["\n", " x ", "line\nline\n"],
        "lora_target_modules": [["q_proj"]],
    }.items()
} | dict.fromkeys(["data", "split", "output_dir"], st.text(max_size=9))


def written(values) -> str:
    try:
        return yaml.safe_dump({"seed": values})[:200]
    except ValueError:  # an integer that Python does not write out
        return "seed: 1" + "0" * 5000


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(field_names()) | st.text(max_size=8) | st.integers(), VALUES, max_size=4))
def test_any_values_give_settings_or_one_error(values):
    try:
        assert isinstance(load_config(overrides=values), Config)
    except UserError as error:
        assert error.problems and all(0 < len(line) < 2000 and "\n" not in line for line in error.problems)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60) | st.builds(written, VALUES))
def test_any_file_gives_settings_or_one_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text, errors="replace")
    try:
        assert isinstance(load_config(file=file), Config)
    except UserError as error:
        assert "any.yaml" in str(error)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries({}, optional=PLAUSIBLE | dict.fromkeys(["data", "split", "output_dir"], st.text(max_size=9)))
)
def test_valid_settings_survive_their_own_file(tmp_path_factory, values):
    try:
        config = load_config(overrides=values)
    except UserError:
        return
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file=file) == config
