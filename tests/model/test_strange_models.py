"""Code and checkpoints of strangers: weights are read, and nothing is obeyed."""

import ast
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vtfast
from vtfast.data import Processor
from vtfast.model.loading import load_model
from vtfast.utils.errors import UserError

ROOT = Path(vtfast.__file__).parent.parent


# Code


FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "marshal.loads",
    "shelve.open",
    "dill.loads",
    "joblib.load",
    "tokenizer.apply_chat_template",
}


def calls(folder: str):
    """(place, dotted name, keywords) of every call in the Python files of a folder."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), keywords


@pytest.mark.parametrize("folder", ["vtfast", "kernels", "bench"])
def test_no_code_is_made_of_data(folder):
    found = list(calls(folder))
    assert found
    for place, name, keywords in found:
        assert name not in FORBIDDEN, place
        assert keywords.get("shell", "False") == "False", place
        assert name != "torch.load" or keywords.get("weights_only") == "True", place
        assert keywords.get("trust_remote_code", "False") == "False", place
        if name.endswith("from_pretrained") and name.startswith("Auto"):
            assert keywords.get("trust_remote_code") == "False", f"{place}: None would ask the user"


class Evil:
    """A pickle of it leaves a file behind when it is read."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.fixture
def checkpoint(base_path, tmp_path) -> Path:
    return Path(shutil.copytree(base_path, tmp_path / "checkpoint"))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_never_read(checkpoint, tmp_path, name):
    torch.save({"model": Evil(tmp_path / "proof")}, checkpoint / name)
    load_model(checkpoint)  # beside safetensors it is passed over
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"has no \*.safetensors weights \({name} is a pickle"):
        load_model(checkpoint)
    assert not (tmp_path / "proof").exists()


def test_an_index_names_safetensors_of_its_own_folder_alone(checkpoint, tmp_path):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "model-1.safetensors")
    shutil.copy(checkpoint / "model-1.safetensors", tmp_path / "other.safetensors")
    torch.save(weights, checkpoint / "model.bin")
    index = checkpoint / "model.safetensors.index.json"

    def load(name):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
        return load_model(checkpoint)

    load("model-1.safetensors")
    for name in ("../other.safetensors", str(tmp_path / "other.safetensors"), "model.bin", 3, ""):
        with pytest.raises(UserError, match=r"index\.json: .* is not a \*\.safetensors file of this folder"):
            load(name)
    with pytest.raises(UserError, match=r"index\.json: 'gone\.safetensors' is not a"):
        load("gone.safetensors")


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture
def adapters(base_path, tmp_path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    names = [f"base_model.model.model.language_model.layers.{i}.self_attn.q_proj.lora" for i in range(3)]
    tensors = {f"{name}_A.weight": torch.ones(2, 96) for name in names}
    tensors |= {f"{name}_B.weight": torch.ones(96, 2) for name in names}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(ADAPTER | {"base_model_name_or_path": str(base_path)})
    (folder / "adapter_config.json").write_text(text)
    return folder


def test_adapters_say_which_base_model_they_bring(adapters, base_path, caplog):
    caplog.set_level(logging.INFO)
    name = "language_model.layers.0.self_attn.q_proj.weight"
    adapted, plain = (dict(load_model(f).module.model.named_parameters()) for f in (adapters, base_path))
    torch.testing.assert_close(adapted[name], plain[name] + 2 * torch.full((96, 96), 2.0))
    assert f"{adapters} holds LoRA adapters; their base model is loaded: {base_path}" in caplog.text


def test_adapters_are_weights_and_nothing_else(adapters, tmp_path):
    config = adapters / "adapter_config.json"
    for key, value in (("peft_type", "XLORA"), ("megatron_config", {"x": 1}), ("modules_to_save", ["lm_head"])):
        before = config.read_text()
        change(config, **{key: value})
        with pytest.raises(UserError, match=f"adapter_config.json: {key}: "):
            load_model(adapters)
        config.write_text(before)
    change(config, base_model_name_or_path=str(adapters))
    with pytest.raises(UserError, match="holds adapters itself"):
        load_model(adapters)
    (adapters / "adapter_model.safetensors").unlink()
    torch.save({"model": Evil(tmp_path / "proof")}, adapters / "adapter_model.bin")
    change(config, base_model_name_or_path="x")
    with pytest.raises(UserError, match=r"missing or damaged \(adapter_model\.bin is a pickle"):
        load_model(adapters)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_never_runs(checkpoint, tmp_path, file, monkeypatch):
    """Where nothing was said about it, transformers asks on the terminal: here everybody answers yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (checkpoint / "evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\n")
    auto = {"AutoConfig": "evil.X", "AutoTokenizer": ["evil.X", "evil.X"], "AutoModel": "evil.X"}
    change(checkpoint / file, auto_map=auto, tokenizer_class="X")
    if file == "config.json":
        change(checkpoint / file, model_type="evil")
    for load in (load_model, Processor.from_pretrained):
        try:
            load(checkpoint)
        except UserError:
            assert load is not load_model or file == "config.json"
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "hidden_size", 10**12),
        ("text_config", "num_hidden_layers", 10**9),
        ("vision_config", "depth", -1),
        ("text_config", "vocab_size", "400"),
        ("text_config", "quantization_config", {"quant_method": "gptq"}),
        (None, "transformers_weights", "../x.safetensors"),
        (None, "text_config", [1]),
    ],
)
def test_a_config_is_refused_before_anything_is_built(checkpoint, part, key, value):
    file = checkpoint / "config.json"
    values = json.loads(file.read_text())
    (values[part] if part else values)[key] = value
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"config\.json: (\w+\.)?{key}: "):
        load_model(checkpoint)


def test_a_config_for_more_weights_than_the_files_hold_takes_no_memory(checkpoint):
    file = checkpoint / "config.json"
    values = json.loads(file.read_text())
    values["text_config"] |= {"intermediate_size": 1 << 20, "num_hidden_layers": 1000, "layer_types": None}
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"describes a model of \d{12} weights, and the files hold \d{6}"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", 0),
        ("merge_size", "2"),
        ("image_std", [1, 0, 1]),
        ("image_mean", [1]),
        ("size", {}),
        ("rescale_factor", None),
    ],
)
def test_a_preprocessor_with_unusable_numbers_is_refused(checkpoint, key, value):
    change(checkpoint / "preprocessor_config.json", **{key: value})
    with pytest.raises(UserError, match=f"{key}|tokenizer and image processor"):
        Processor.from_pretrained(checkpoint)


def test_images_are_not_enlarged_without_limit(base_path):
    with pytest.raises(UserError, match="min at most 89478485"):
        Processor.from_pretrained(base_path, min_pixels=10**12, max_pixels=10**13)
