"""What comes from elsewhere (checkpoints, data, run folders, answers) is read, and never obeyed."""

import ast
import json
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from make_benchmarks import cvbench_row, vsr_row, write_cvbench
from make_files import encoded, picture, png_header, write_jsonl
from make_runs import file_name, hostile_run, metrics_row, write_run
from safetensors.torch import load_file, save_file

import vtfast
from vtfast.cli import main
from vtfast.config import Config
from vtfast.data import Processor, load_samples
from vtfast.errors import UserError
from vtfast.files import read_mapping, write_whole
from vtfast.images import FORMATS, ImageError, check_image, load_image
from vtfast.model import load_model
from vtfast.report import write_report
from vtfast.terminal import Formatter, message, printable

ROOT = Path(vtfast.__file__).parent.parent
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\x00"


# Code


FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "os.system", "os.popen",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "shelve.open", "dill.loads", "joblib.load",
    "tokenizer.apply_chat_template",
}  # fmt: skip


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
        with pytest.raises(
            UserError, match=r"index\.json: .* is no \*\.safetensors file of this folder"
        ):
            load(name)
    with pytest.raises(UserError, match=r"index\.json: gone\.safetensors is missing"):
        load("gone.safetensors")


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture
def adapters(base_path, tmp_path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    names = [
        f"base_model.model.model.language_model.layers.{i}.self_attn.q_proj.lora" for i in range(3)
    ]
    tensors = {f"{name}_A.weight": torch.ones(2, 96) for name in names}
    tensors |= {f"{name}_B.weight": torch.ones(96, 2) for name in names}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(ADAPTER | {"base_model_name_or_path": str(base_path)})
    (folder / "adapter_config.json").write_text(text)
    return folder


def test_adapters_say_which_base_model_they_bring(adapters, base_path, caplog):
    caplog.set_level(logging.INFO)
    name = "language_model.layers.0.self_attn.q_proj.weight"
    adapted, plain = (
        dict(load_model(f).module.model.named_parameters()) for f in (adapters, base_path)
    )
    torch.testing.assert_close(adapted[name], plain[name] + 2 * torch.full((96, 96), 2.0))
    assert (
        f"{adapters} holds LoRA adapters; the base model that they name is loaded: {base_path}"
        in caplog.text
    )


def test_adapters_are_weights_and_nothing_else(adapters, tmp_path):
    config = adapters / "adapter_config.json"
    for key, value in (
        ("peft_type", "XLORA"),
        ("megatron_config", {"x": 1}),
        ("modules_to_save", ["lm_head"]),
    ):
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
    with pytest.raises(
        UserError, match=r"no adapter_model\.safetensors \(adapter_model\.bin is a pickle"
    ):
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
    values["text_config"] |= {
        "intermediate_size": 1 << 20,
        "num_hidden_layers": 1000,
        "layer_types": None,
    }
    file.write_text(json.dumps(values))
    with pytest.raises(
        UserError, match=r"describes a model of \d{12} weights, and the files hold \d{6}"
    ):
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
    with pytest.raises(UserError, match="enlarged beyond"):
        Processor.from_pretrained(base_path, min_pixels=10**12, max_pixels=10**13)


# Images


def gif(width: int, height: int, frames: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + frame * frames
        + b";"
    )


def webp_canvas(width: int, height: int) -> bytes:
    """A still WebP of 8 x 8 that says its canvas is larger."""
    data = encoded(picture(8, 8), "WEBP", lossless=True)[12:]
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def png_with_text(size: int) -> bytes:
    """A good PNG with a text chunk that unpacks to `size` bytes."""
    data = encoded(picture(), "PNG")
    chunk = b"zTXt" + b"k\0\0" + zlib.compress(bytes(size))
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:33] + chunk + data[33:]


BOMBS = {
    "a PNG's header": png_header(30_000, 30_000),
    "a JPEG's frame": encoded().replace(b"\x00\x1e\x00\x28\x03", b"\xff\xff\xff\xff\x03"),
    "a GIF's screen": gif(65_535, 65_535, 1),
    "a WebP's canvas": webp_canvas(16_384, 16_384),
    "a BMP's header": encoded(kind="BMP")[:18]
    + struct.pack("<ii", 30_000, 30_000)
    + encoded(kind="BMP")[26:],
    "a PNG's text": png_with_text(1 << 29),
    "a strip": png_header(30_000, 2),
    "a line": png_header(500, 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_and_takes_no_memory(name):
    """In a process of its own, with a quarter of the memory that its pixels would take."""
    code = (
        "import resource, sys; from vtfast.images import check_image, ImageError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: check_image(sys.stdin.buffer.read())\n"
        "except ImageError as error: print('refused:', error)\n"
        "print('grown', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=BOMBS[name], capture_output=True, timeout=60
    )
    text = done.stdout.decode()
    assert "refused: " in text, text + done.stderr.decode()
    assert int(text.split("grown ")[1]) < 64, text


def test_only_the_first_of_many_frames_is_looked_at():
    assert load_image(gif(40, 30, 200_000)).size == (40, 30)


@pytest.mark.parametrize(
    "kind", ["TIFF", "ICO", "PPM", "TGA", "PCX", "EPS", "ICNS", "AVIF", "JPEG2000", "DDS"]
)
def test_other_formats_are_not_even_opened(kind, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    data = encoded(picture(64, 64), kind)
    with pytest.raises(ImageError, match=r"not an image of any known format$"):
        check_image(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_documented_formats_are_read(kind):
    check_image(encoded(kind=kind))


def rows_with(folder: Path, *images) -> Path:
    rows = [{"question": "What?", "answer": "x", "image": image} for image in images]
    return write_jsonl(
        folder / "data" / "rows.jsonl", [{"question": "Text?", "answer": "x"}, *rows]
    )


def test_paths_in_data_are_regular_files_near_them(tmp_path):
    (tmp_path / "data").mkdir()
    for folder in (tmp_path / "data", tmp_path, tmp_path / "images"):
        folder.mkdir(exist_ok=True)
        (folder / "x.png").write_bytes(encoded(kind="PNG"))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "images" / "x.png")
    allowed = ["x.png", "link.png", "../images/x.png", str(tmp_path / "images" / "x.png")]
    assert len(load_samples(rows_with(tmp_path, *allowed), on_bad="error")) == 5

    os.mkfifo(tmp_path / "data" / "pipe.png")
    (tmp_path / "data" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "data" / "loop.png").symlink_to("loop.png")
    refused = {
        "/dev/zero": "not a regular file: /dev/zero",
        "zero.png": "not a regular file",
        "pipe.png": "not a regular file",
        "loop.png": "no usable path: .*loop.png",
        ".": "not a regular file",
        "/proc/self/mem": "empty file|not an image|no usable path",
        "../../x.png": r"\.\./\.\./x\.png leads out of .*: give an absolute path",
        "http://localhost:1/x.png": "is a link, and images are not fetched",
        "data:image/png;base64," + "A" * 5000: r"data:image/png;base64,A+\.\.\.A+ is a link",
        "a" * 5000: r"no usable path: .*a\.\.\.a+ \(File name too long\)",
        "x\0.png": "no usable path",
    }
    samples = load_samples(rows_with(tmp_path, *refused))
    assert [row for row, _ in samples.skipped] == list(range(1, len(refused) + 1))
    for (row, reason), pattern in zip(samples.skipped, refused.values(), strict=True):
        assert re.search(pattern, reason), (row, reason)
        assert len(reason) < 400


def test_a_path_in_data_from_the_hub_is_refused():
    from vtfast.data import BadRow, read_row

    row = {"question": "What?", "answer": "x", "image": "/etc/hostname"}
    with pytest.raises(BadRow, match="/etc/hostname is a path, and the data set has no folder"):
        read_row(row, folder=None)


# Rows and settings


def test_texts_that_no_tokenizer_takes_are_bad_rows(tmp_path):
    rows = [
        {"question": "fine?", "answer": "x"},
        {"question": "half \ud800", "answer": "x"},
        {"question": "long" * 300_000, "answer": "x"},
        {"question": "huge?", "answer": 10**400},
        {"question": "nul \0 and\nline?", "answer": "x"},
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with file.open("ab") as opened:
        opened.write(b'{"question": "' + b"[" * 100_000 + b'": 1}\n' + b"[" * 100_000 + b"\n")
    samples = load_samples(file)
    assert [s.row for s in samples] == [0, 3, 4] and samples[1].answer == str(10**400)
    assert [row for row, _ in samples.skipped] == [1, 2, 5, 6]
    assert "lone surrogate" in samples.skipped[0][1] and "more than" in samples.skipped[1][1]


def test_a_row_without_end_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("vtfast.data.files.LONGEST_LINE", 100)
    good = json.dumps({"question": "Where?", "answer": "x"})
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "\n".join([good, good + " " * 500, good, " " * (99 - len(good)) + good, "x" * 100])
    )
    samples = load_samples(file)
    assert [s.row for s in samples] == [0, 2, 3]
    assert [row for row, _ in samples.skipped] == [1, 4]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nfreeze: [*b, *b]", r"line 2: alias \*a: write the value out"),
        ("seed: !!python/object/apply:os.system ['touch proof']", "line 1: could not determine a constructor"),
        ("seed: 2024-99-99", "month must be in 1..12"),
        ("[" * 20_000, "too deeply nested"),
        ("seed: " + "9" * 6000, "not valid YAML"),
        ("x" * 2_000_000, "2000000 bytes, more than"),
        ("1: 2", "the name 1 is no text"),
    ],
)  # fmt: skip
def test_settings_are_plain_values(tmp_path, text, reason):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"settings.yaml: .*{reason}") as refused:
        read_mapping(file)
    assert "\n" not in str(refused.value)


def test_settings_are_not_read_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "settings.yaml")
    with pytest.raises(UserError, match="not a regular file"):
        read_mapping(tmp_path / "settings.yaml")


@pytest.mark.parametrize("flag", ["--model", "--data", "--template", "--output_dir"])
@pytest.mark.parametrize("value", ["~nobody-of-this-name/x.txt", "x" * 5000 + ".txt", "a/\0.txt"])
def test_paths_that_cannot_be_are_one_line(flag, value, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train", flag, value, "--max_steps", "1"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and len(error[0]) < 4200
    assert not list(tmp_path.iterdir())


# Run folders


@pytest.mark.parametrize("name", ["../../x", "..", "a/b", "/tmp/x", "", "a\nb", ".hidden"])
def test_a_recipes_name_leads_nowhere(name, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"recipe": name}))
    assert main(["train", "--config", str(file), "--dry_run"]) == 2
    with pytest.raises(UserError, match="must be a plain name"):
        Config(recipe=name)


@pytest.fixture
def evaluated(tmp_path, base_path):
    """A run of another person with an answered benchmark."""
    run = write_run(tmp_path / "run")
    shutil.copytree(base_path, run / "checkpoints" / "step-1")
    (run / "evaluations" / "step-1").mkdir(parents=True)
    return run


def evaluate(run: Path, *more: str) -> int:
    cvbench = write_cvbench(run.parent / "cvbench", [cvbench_row(0), cvbench_row(1, "Depth")])
    return main(
        [
            "eval",
            "--model",
            str(run),
            "--data",
            f"cvbench={cvbench}",
            "--max_completion_length",
            "2",
            *more,
        ]
    )


@pytest.mark.parametrize(
    "link", ["evaluations", "evaluations/step-1", "evaluations/step-1/cvbench.jsonl"]
)
def test_an_evaluation_writes_through_no_link_out_of_the_run(evaluated, link, capsys):
    """Else the file that a link names would be cut off where its first line is no answer."""
    elsewhere = evaluated.parent / "mine"
    place = evaluated / link
    if place.is_dir():
        shutil.rmtree(place)
        elsewhere.mkdir()
    else:
        elsewhere.write_text("a secret without a line feed")
    place.symlink_to(elsewhere)
    assert evaluate(evaluated) == 2
    assert "outside of" in capsys.readouterr().err
    assert (
        not list(elsewhere.iterdir()) if elsewhere.is_dir() else "secret" in elsewhere.read_text()
    )


@pytest.mark.parametrize("name", ["settings.json", "scores.json"])
def test_a_link_in_place_of_a_result_is_replaced(evaluated, name):
    elsewhere = evaluated.parent / "mine.json"
    elsewhere.write_text("{}")
    (evaluated / "evaluations" / "step-1" / name).symlink_to(elsewhere)
    assert evaluate(evaluated) == 0
    assert elsewhere.read_text() == "{}"
    assert "cvbench" in json.loads((evaluated / "evaluations" / "step-1" / name).read_text())


def test_a_report_replaces_a_link(tmp_path):
    run = write_run(tmp_path / "run", [metrics_row(1)])
    (tmp_path / "mine").write_text("mine")
    (run / "report.html").symlink_to(tmp_path / "mine")
    write_report([run])
    assert (tmp_path / "mine").read_text() == "mine" and not (run / "report.html").is_symlink()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "x", "after \ud800")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "before")]


def test_a_link_where_it_is_written_first_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".x.guessed.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "x", "theirs")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_runs_settings_import_nothing_and_name_no_data(evaluated, tmp_path, monkeypatch):
    (tmp_path / "evil_reward.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {
        "reward_funcs": ["evil_reward:f"],
        "data": "/dev/zero",
        "template": "r1-zero",
        "max_pixels": 3136,
    }
    (evaluated / "config.yaml").write_text(yaml.safe_dump(config))
    assert evaluate(evaluated) == 0 and main(["report", str(evaluated)]) == 0
    assert not (tmp_path / "proof").exists() and "evil_reward" not in sys.modules


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"template": "/dev/zero"}, "not a regular file"),
        ({"template": ["r1-zero"]}, r"template: \['r1-zero'\] is no str"),
        ({"max_pixels": "many"}, "max_pixels: 'many' is no int"),
        ({"min_pixels": 10**12, "max_pixels": 10**13}, "enlarged beyond"),
    ],
)
def test_a_runs_settings_are_checked_like_others(evaluated, settings, reason, capsys):
    (evaluated / "config.yaml").write_text(yaml.safe_dump(settings))
    assert evaluate(evaluated) == 2
    assert re.search(reason, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["..", "x/y.jpg", "../x.jpg", "a" * 300])
def test_an_image_that_is_fetched_has_a_plain_name(name, tmp_path):
    from vtfast.evaluate.vsr import read

    with pytest.raises(UserError, match="a file name is wanted"):
        read(vsr_row(0, image=name), 0)


def test_a_cached_base_needs_no_network(tmp_path, monkeypatch, capsys):
    """A whole run, its evaluation and its report, with every connection refused."""
    asked = []

    def refuse(self, address, *_):
        asked.append(address)
        raise OSError("no network here")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *names, **_: refuse(None, names))
    run = tmp_path / "run"
    flags = {"max_steps": 1, "eval_samples": 4, "num_generations": 2, "max_completion_length": 8}
    flags |= {"report_to": "none", "per_device_train_batch_size": 2, "output_dir": run}
    assert main(["train", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    assert evaluate(run) == 0 and main(["report", str(run)]) == 0
    assert asked == []


# The terminal


def test_steering_characters_are_shown_and_not_obeyed():
    assert printable("a\tb\n\x1b[2J\x9b\u202e\ud800é😀") == "a\tb\n\\x1b[2J\\x9b\\u202e\\ud800é😀"
    assert message("two\nlines\x07") == "two lines\\x07"
    assert len(message("x" * 10**6)) < 4100 and message("x" * 10**6 + "end").endswith("end")
    record = logging.makeLogRecord({"msg": "%s", "args": (ESCAPES,)})
    assert "\x1b" not in Formatter("%(message)s").format(record)


def test_what_data_say_does_not_steer_the_terminal(tmp_path, capfd):
    """Bad rows, kinds of questions, file names and settings, in every command that prints some."""
    rows = [
        {"question": f"Where{ESCAPES}?", "answer": "x", "question_type": ESCAPES},
        {"question": "Where?", "answer": f"z{ESCAPES}", "options": ["a", ESCAPES]},
        {"question": "Where?", "answer": "x", "image": f"{ESCAPES}.png"},
    ]
    name = ESCAPES.rstrip("\0") + ".jsonl"
    file = str(write_jsonl(tmp_path / name, rows))
    for command in (
        ["data", "inspect", file],
        ["data", "inspect", file, "--json"],
        ["train", "--data", file, "--on_bad_sample", "error"],
        ["train", "--data", f"{tmp_path}/gone/{name}"],
        ["train", "--template", name],
        ["report", file],
    ):
        assert main(command) in (0, 2)
        text = "".join(capfd.readouterr())
        assert not set("\x1b\x07\x9b\u202e\0") & set(text), command
        assert "\\x1b" in text or "\\u001b" in text, command


def test_the_log_of_a_command_does_not_steer_the_terminal():
    code = "import logging; from vtfast import cli; cli._prepare(); logging.getLogger('vtfast').warning('\x1b[2J')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.stderr == b"\\x1b[2J\n"


# The page

MARKUP = (
    "</script><script>owned()</script ></script/><!--<script >owned()"
    "<img src=x onerror=owned()> <!-- ]]> --> \u2028\u2029 ' \" ` ${owned()} &lt; "
    "javascript:owned() </title></style><svg/onload=owned()> \x00\x1b[2J"
)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text that it holds as data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.data, self.reading = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, attributes))
        self.reading = ("id", "data") in attributes

    def handle_data(self, data):
        if self.reading:
            self.data += data

    def handle_endtag(self, tag):
        self.reading = False


def test_a_page_has_the_same_elements_whatever_is_in_it(tmp_path):
    hostile = hostile_run(tmp_path / file_name(MARKUP), MARKUP)
    pages = [
        write_report([run]).read_text() for run in (hostile, hostile_run(tmp_path / "tame", "tame"))
    ]
    found, tame = map(Elements, pages)
    assert found.found == tame.found
    assert [tag for tag, _ in found.found].count("script") == 2
    assert not set("<>&\u2028\u2029") & set(
        found.data
    )  # a browser ends a script at `</script ` already
    assert json.loads(found.data)["completions"]["rows"][0]["completion"] == MARKUP
    assert MARKUP in [row["label"] for row in json.loads(found.data)["settings"][0]["rows"]]
    policy = next(
        dict(attributes)
        for tag, attributes in found.found
        if tag == "meta" and len(attributes) == 2
    )
    assert policy["content"].startswith("default-src 'none'; style-src 'sha256-")
