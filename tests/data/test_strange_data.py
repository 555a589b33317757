"""Images, rows, paths and settings of strangers: refused by name, within bounded memory, and nothing of them runs."""

import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import yaml
from make_files import encoded, picture, png_header, write_jsonl

from vtfast.cli.main import main
from vtfast.config import Config
from vtfast.data import load_samples
from vtfast.data.images import FORMATS, ImageError, check_image, load_image
from vtfast.utils.errors import UserError
from vtfast.utils.yaml_file import read_yaml


def gif(width: int, height: int, frames: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame * frames + b";"


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
    "a BMP's header": encoded(kind="BMP")[:18] + struct.pack("<ii", 30_000, 30_000) + encoded(kind="BMP")[26:],
    "a PNG's text": png_with_text(1 << 29),
    "a strip": png_header(30_000, 2),
    "a line": png_header(500, 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_and_takes_no_memory(name):
    """In a process of its own, with a quarter of the memory that its pixels would take."""
    code = (
        "import resource, sys; from vtfast.data.images import check_image, ImageError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: check_image(sys.stdin.buffer.read())\n"
        "except ImageError as error: print('refused:', error)\n"
        "print('grown', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=BOMBS[name], capture_output=True, timeout=60)
    text = done.stdout.decode()
    assert "refused: " in text, text + done.stderr.decode()
    assert int(text.split("grown ")[1]) < 64, text


def test_only_the_first_of_many_frames_is_looked_at():
    assert load_image(gif(40, 30, 200_000)).size == (40, 30)


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "TGA", "PCX", "EPS", "ICNS", "AVIF", "JPEG2000", "DDS"])
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
    return write_jsonl(folder / "data" / "rows.jsonl", [{"question": "Text?", "answer": "x"}, *rows])


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
        "loop.png": "not a readable image .*loop.png",
        ".": "not a regular file",
        "/proc/self/mem": "not an image|not a readable image",
        "../../x.png": r"\.\./\.\./x\.png leads out of .*: give an absolute path",
        "http://localhost:1/x.png": "is a link, and images are not fetched",
        "data:image/png;base64," + "A" * 5000: r"data:image/png;base64,A+\.\.\.A+ is a link",
        "a" * 5000: r"not a readable image \(.*File name too long: .*\.\.\.a+",
        "x\0.png": r"not a readable image \(.*null",
    }
    samples = load_samples(rows_with(tmp_path, *refused))
    assert [row for row, _ in samples.skipped] == list(range(1, len(refused) + 1))
    for (row, reason), pattern in zip(samples.skipped, refused.values(), strict=True):
        assert re.search(pattern, reason), (row, reason)
        assert len(reason) < 400


def test_a_path_in_data_from_the_hub_is_refused():
    from vtfast.data import InvalidRow, parse_row

    row = {"question": "What?", "answer": "x", "image": "/etc/hostname"}
    with pytest.raises(InvalidRow, match="/etc/hostname is a path, and the data set has no folder"):
        parse_row(row, folder=None)


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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nfreeze: [*b, *b]", r"line 2: \*a is an alias; write the value itself"),
        ("seed: !!python/object/apply:os.system ['touch proof']", "line 1: tag:yaml.org,2002:python/object.* is a tag"),
        ("seed: 2024-99-99", "month must be in 1..12"),
        ("[" * 20_000, "nested too deeply"),
        ("seed: " + "9" * 6000, "not valid YAML"),
        ("x" * 2_000_000, "longer than 65536 bytes"),
        ("1: 2", "line 1: a name must be text"),
    ],
)
def test_settings_are_plain_values(tmp_path, text, reason):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"settings.yaml: .*{reason}") as refused:
        read_yaml(file)
    assert "\n" not in str(refused.value)


def test_settings_are_not_read_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "settings.yaml")
    with pytest.raises(UserError, match="not a regular file"):
        read_yaml(tmp_path / "settings.yaml")


@pytest.mark.parametrize("flag", ["--model", "--data", "--template", "--output_dir"])
@pytest.mark.parametrize("value", ["~nobody-of-this-name/x.txt", "x" * 5000 + ".txt", "a/\0.txt"])
def test_paths_that_cannot_be_are_one_line(flag, value, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train", flag, value, "--max_steps", "1"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and len(error[0]) < 4200
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../x", "..", "a/b", "/tmp/x", "", "a\nb", ".hidden"])
def test_a_recipes_name_leads_nowhere(name, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"recipe": name}))
    assert main(["train", "--config", str(file), "--dry_run"]) == 2
    with pytest.raises(UserError, match=r"must be (a plain name|text, and not empty)"):
        Config(recipe=name)
