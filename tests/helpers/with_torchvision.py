"""What holds where torchvision is installed. Not collected by name: test_torchvision.py runs it in its own process,
since a CPU environment is better off without torchvision and a process cannot have it both ways."""

import subprocess
import sys
from pathlib import Path

import pytest
from make_files import picture

from vtfast.data import resize
from vtfast.data.processor import PLACEHOLDER, Processor
from vtfast.data.resize import resize_image
from vtfast.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(random_path):
    return random_path


CASES = [
    (picture(512, 512), 3136, 401408),
    (picture(640, 480), 3136, 12845056),
    (picture(1600, 900), 3136, 401408),
    (picture(30, 50), 3136, 401408),
    (picture(10, 1990), 3136, 401408),
    (picture(2, 3), 3136, 401408),
    (picture(70, 42), 784, 401408),  # 2.5 and 1.5 times 28: rounding half to even
    (picture(120, 90, mode="RGBA"), 3136, 401408),
    (picture(120, 90, mode="L"), 3136, 401408),
    (picture(120, 90, mode="LA"), 3136, 401408),
    (picture(120, 90, mode="CMYK"), 3136, 401408),
    (picture(120, 90).quantize(16), 3136, 401408),
    (picture(120, 90).convert("1"), 3136, 401408),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].size}-{case[0].mode}")
def test_our_resizing_is_qwen_vl_utils(case):
    ours, theirs = resize_image(*case), resize._qwen_resize(*case)
    assert ours.size == theirs.size
    assert ours.mode == theirs.mode == "RGB"
    assert ours.tobytes() == theirs.tobytes()


def test_a_strip_that_would_vanish(folder):
    """Shrunk to the limit, its short side rounds to nothing: both ways must refuse it."""
    image = picture(6000, 40)
    for shrink in (resize_image, resize._qwen_resize):
        with pytest.raises(ValueError, match=r"short side|must be > 0"):
            shrink(image, 3136, 6272)
    processor = Processor.from_pretrained(folder, max_pixels=6272)
    with pytest.raises(UserError, match="image 1 of 1"):
        processor.encode(PLACEHOLDER, [image])
    with pytest.raises(UserError, match="short side"):  # and before a run starts
        processor.prompt_length(PLACEHOLDER, [image.size])


WORLD = """
import logging, sys
if sys.argv[1] == "without":
    sys.modules["torchvision"] = None  # as if it were not installed
logging.basicConfig(level=logging.INFO)
from vtfast.data import Processor
assert "transformers" not in sys.modules
from make_files import picture
from vtfast.data.processor import PLACEHOLDER
processor = Processor.from_pretrained(sys.argv[2])
images = [picture(300, 200), picture(90, 120, mode="RGBA")]
prompts = [processor.encode(PLACEHOLDER * 2, images) for _ in range(2)]
print(prompts[0].key, "qwen_vl_utils.vision_process" in sys.modules)
"""


def test_both_worlds_give_the_same_prompt(folder):
    keys = set()
    for world, used, log in [
        ("with", "True", "images are resized by qwen_vl_utils"),
        ("without", "False", "images are resized by vtfast, to the same pixels: qwen_vl_utils does not import"),
    ]:
        run = subprocess.run(
            [sys.executable, "-c", WORLD, world, folder], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        key, utils = run.stdout.split()
        assert utils == used
        assert run.stderr.count(log) == 1
        keys.add(key)
    assert len(keys) == 1


LIGHT = """
import sys
import vtfast
from vtfast.utils import torchvision_shim
assert "transformers" not in sys.modules and "torchvision" not in sys.modules
assert torchvision_shim.patch_torchvision() is False  # once is enough
import torchvision
import transformers.image_utils
"""


def test_importing_vtfast_makes_torchvision_importable_and_stays_light():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
