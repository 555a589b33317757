"""Settings and templates: YAML files, flags, prompt templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

import vtfast
from malformed import WORKS, Kind, command
from malformed.values import NUMBERS, TEXTS, VALUES, damage
from vtfast.config import field_names, load_config

RECIPE = Path(vtfast.__file__).parent / "config" / "recipes" / "tiny-spatial.yaml"


def settings_file(text: str | bytes, folder: Path) -> str:
    file = folder / "settings.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    load_config(file=file).to_yaml()
    return WORKS


def _yaml(settings: Any) -> str:
    return yaml.safe_dump(settings)


NAMES = st.sampled_from([*field_names(), "base", "recipe"])
YAML_TEXTS = st.sampled_from(
    [
        "!!python/object/apply:os.system ['true']",
        "seed: !!python/name:os.system",
        "a: &a [x]\nfreeze: *a",
        "a: &a [x, x]\nb: &b [*a, *a]\nfreeze: [*b, *b]",
        "<<: {seed: 1}",
        "? [a]\n: 1",
        "1: 2",
        "seed: 2024-99-99",
        "seed: 1:99:99",
        "seed: 0x" + "f" * 6000,
        "seed: " + "9" * 6000,
        "- seed",
        "seed: 1\n---\nseed: 2",
        "seed: \0",
        "\ufeffseed: 1",
        "seed: 'open",
        "%YAML 9.9\n---\nseed: 1",
        "seed: !!binary x",
        "seed: !!set {a, b}",
        "[" * 5000,
        "{a: " * 5000,
        "null",
        "",
        "recipe: ../../x",
        "base: ../../x",
        "base: [a]",
        "seed: .inf",
        'recipe: ""',
    ]
)
SETTINGS = st.one_of(
    YAML_TEXTS,
    st.dictionaries(NAMES, VALUES, min_size=1, max_size=4).map(_yaml),
    st.dictionaries(TEXTS, VALUES, max_size=2).map(_yaml),
    damage(RECIPE.read_bytes()),
)


def flags(arguments: list[str], folder: Path) -> str:
    return command("train", "--dry-run", *arguments)


FLAGS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(field_names()), st.one_of(TEXTS, NUMBERS.map(str))).map(
            lambda pair: f"--{pair[0]}={pair[1]}"
        ),
        TEXTS.filter(lambda text: text not in ("-h", "--help")),
    ),
    min_size=1,
    max_size=3,
)


def template(data: bytes, folder: Path) -> str:
    from vtfast.data import Sample
    from vtfast.data.prompt_templates import load_template, render

    (folder / "template.txt").write_bytes(data)
    text = load_template(folder / "template.txt")
    render(text, Sample("Where {images}?", ["a", "b"], "a", []))
    return WORKS


TEMPLATES = damage(b"{images}{question}[[ Choose: {options}]]\nAssistant: <think>") | st.binary()

KINDS = [
    Kind("settings: YAML", SETTINGS, settings_file, 100),
    Kind("settings: flags", FLAGS, flags, 60),
    Kind("templates", TEMPLATES, template, 40),
]
