"""What gets installed, and that our folder `kernels/` never shadows Hugging Face's package of that name."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import outside_ranks
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def given(monkeypatch):
    """The arguments of setup.py."""
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return given


def test_every_package_is_listed(given):
    on_disk = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("vtfast/**/*.py")}
    assert set(given["packages"]) == on_disk | {"vtfast_kernels"}


@pytest.mark.parametrize("file", ["constraints.txt", "docs/constraints-vllm.txt"])
def test_constraints_are_within_what_is_required(given, file):
    required = map(Requirement, given["install_requires"])
    admitted = {requirement.name: requirement.specifier for requirement in required}
    lines = [line.partition(" #")[0] for line in (ROOT / file).read_text().splitlines() if line[:1] != "#"]
    pinned = [Requirement(line) for line in lines]
    assert {"torch", "transformers", "deepspeed"} <= {pin.name for pin in pinned}
    for pin in pinned:
        (version,) = pin.specifier
        assert version.operator == "==" and admitted.get(pin.name, SpecifierSet()).contains(version.version), pin


def test_kernels_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()


IMPORTS = """
import vtfast_kernels.linear_grpo_loss, sys
assert not {"transformers", "deepspeed"} & set(sys.modules), "the kernels need torch and triton only"
from transformers import Qwen2VLForConditionalGeneration
"""


def test_the_root_folder_does_not_shadow_the_hubs_kernels(tmp_path):
    """From the repository root, without that package and with a stand-in for it."""
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, check=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True")
    environment = outside_ranks() | {"PYTHONPATH": str(tmp_path)}
    check = IMPORTS + "import kernels; assert kernels.theirs"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=environment, check=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What a user installs: the wheel built from the sdist, in an empty folder."""
    work = tmp_path_factory.mktemp("dist")
    copy = work / "checkout"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        if (ROOT / name).is_file() and not name.startswith(("bench/", "docs/", "tests/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    quiet = {"capture_output": True, "text": True, "check": True}
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", str(work)], cwd=copy, **quiet)
    (sdist,) = work.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(work), str(sdist)], **quiet)
    (wheel,) = work.glob("*.whl")
    target = work / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], **quiet)
    return target


def test_sdist_and_wheel_hold_every_file_of_the_packages(installed):
    def files(folder, top):
        return {
            path.relative_to(folder).as_posix()
            for path in (folder / top).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    assert files(installed, "vtfast") == files(ROOT, "vtfast")
    ours = {name.replace("kernels/", "vtfast_kernels/", 1) for name in files(ROOT, "kernels") if name.endswith(".py")}
    assert files(installed, "vtfast_kernels") == ours


def test_the_installed_package_runs_from_anywhere(installed, tmp_path):
    environment = outside_ranks() | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "vtfast", "train", "--dry-run", "--max_steps", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "max_steps: 3" in done.stdout
    where = subprocess.run(
        [sys.executable, "-c", "import vtfast, vtfast_kernels.linear_sample as k; print(vtfast.__file__, k.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(path.startswith(str(installed)) for path in where.stdout.split())


def test_the_license_is_named_by_its_spdx_name(installed):
    """In the installed package's metadata and in the README."""
    (metadata,) = installed.glob("vtfast-*.dist-info/METADATA")
    assert re.search(r"^License(-Expression)?: Apache-2.0$", metadata.read_text(), re.MULTILINE)
    assert "Apache-2.0" in (ROOT / "README.md").read_text().split("## License")[1]


def test_the_changelog_has_the_version():
    version = re.search(r'version="([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
