"""Shared fixtures: the shipped base model, a random tiny one, prompts, and a browser."""

import shutil
from pathlib import Path

import pytest
import torch

LONG = ("test_interpreter.py", "test_trainer.py", "test_elsewhere.py", "test_torchvision.py", "test_rollout_graphs.py")
"""Files of few tests that take long. They are begun first, so that the processes of `make test` end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def base_path() -> Path:
    """The checkpoint that ships with vtfast."""
    import vtfast

    return Path(vtfast.__file__).parent / "model" / "assets" / "tiny-spatial-base"


@pytest.fixture(scope="session")
def random_path(tmp_path_factory) -> Path:
    """A tiny Qwen2-VL with random weights: flat distributions, so that mistakes are not hidden by confidence."""
    from vtfast.model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("model") / "random", weights="random", seed=3)


@pytest.fixture(scope="session")
def policy(random_path):
    from vtfast.model.loading import load_model

    return load_model(random_path)


@pytest.fixture(scope="session")
def processor(random_path):
    from vtfast.data import Processor

    return Processor.from_pretrained(random_path)


@pytest.fixture(scope="session")
def prompts(processor):
    """Four prompts: one image, two images of different sizes, text alone, a large image."""
    from PIL import Image

    from vtfast.data.prompt_templates import IMAGE

    generator = torch.Generator().manual_seed(0)

    def picture(width: int, height: int) -> Image.Image:
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    return [
        processor.encode(IMAGE + "User: How many? Choose: 1 or 2\nAssistant: <think>", [picture(84, 84)]),
        processor.encode(f"First {IMAGE} then {IMAGE} differ how?", [picture(56, 84), picture(112, 56)]),
        processor.encode("User: no picture at all\nAssistant:", []),
        processor.encode(IMAGE + "What is here?", [picture(140, 112)]),
    ]


FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless browser that logs its console and its requests; without one the test skips."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not (binary and chromedriver):
        pytest.skip("needs a browser and its driver (Debian: chromium, chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> dict[str, str]:
    """Settings of a run on a few rendered questions, for those that need not have the embedded default's 2,048."""
    from vtfast.data.synthetic import write_dataset

    folder = tmp_path_factory.mktemp("questions")
    write_dataset(folder, train=20, val=4, seed=0)
    return {"data": str(folder / "train.parquet"), "eval_data": str(folder / "val.parquet")}
