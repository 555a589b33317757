"""The README is short, its figures are rows of bench/results, and its commands and links exist."""

import ast
import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
CITED = re.findall(r"^\|.*\| ([\d.]+) \| (\w+\.csv: .*) \|$", TEXT, re.MULTILINE)


def row_of(citation: str) -> tuple[dict, float]:
    """The newest row of `file.csv: op, peer, start of the shape[, threads], ...`, and our time / theirs: its paired
    ratio if it has one, else the ratio of that run's medians."""
    name, words = citation.split(": ")
    op, peer, shape, *rest = words.split(", ")
    threads = next((word for word in rest if "threads" in word), "")
    with (ROOT / "bench" / "results" / name).open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["op"], row["metric"]) == (op, "ms") and row["shape"].startswith(shape) and threads in row["device"]
        ]
    newest = [row for row in rows if row["peer"] == peer][-1]
    if newest["ratio"]:
        return newest, float(newest["ratio"])
    (ours,) = (row for row in rows if row["peer"] == "ours" and row["date"] == newest["date"])
    return newest, float(ours["p50"]) / float(newest["p50"])


WINGS = re.findall(r"^  (\w+)", TEXT.split("## Layout")[1].split("```")[1], re.MULTILINE)
"""From high to low: a wing imports only from those after it."""


def test_it_is_short():
    assert len(TEXT.splitlines()) < 200


@pytest.mark.parametrize(("figure", "citation"), CITED)
def test_every_figure_is_a_row(figure, citation):
    assert f"{row_of(citation)[1]:.2f}" == figure


def test_there_are_figures():
    assert len(CITED) >= 6


def test_rows_name_the_device_and_the_versions():
    for _, citation in CITED:
        row, _ = row_of(citation)
        assert row["device"] and row["versions"] and row["date"]


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (ROOT / target).exists(), f"{page.name}: {target}"


def test_files_of_the_layout_exist():
    tree = TEXT.split("## Layout")[1].split("```")[1]
    inside = ROOT
    for line in tree.strip().splitlines():
        names = re.split(r"\s{3,}", line.strip())[0].split(" ")
        inside = ROOT / "vtfast" if line.startswith("  ") else ROOT
        for name in names:
            if name.endswith((".py", "/")):
                assert (inside / name).exists(), name


def test_everything_of_the_package_is_in_the_layout():
    for path in (ROOT / "vtfast").iterdir():
        if not path.name.startswith("__"):
            assert path.stem in WINGS, f"{path.name} is not in the layout"


def test_the_commands_exist():
    from vtfast.cli.main import COMMANDS
    from vtfast.config import field_names

    flags = {*field_names(), "recipe", "config", "dry-run", "gpu_memory_gb"}
    for command in re.findall(r"^vtfast (\S+)", TEXT, re.MULTILINE):
        assert command in COMMANDS
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if "train.py" in line:
                after = line.split("#")[0].split("train.py")[1]
                assert set(re.findall(r"--([\w-]+)", after)) <= flags, line


def imports(path: Path) -> set[str]:
    """Wings that a file imports: at its top, inside functions, or for types."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {module.split(".")[1] for module in modules if module and module.startswith("vtfast.")}


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_only_from_those_below_it(wing):
    folder = ROOT / "vtfast" / wing
    for path in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        lower = {wing, *WINGS[WINGS.index(wing) + 1 :]}
        assert imports(path) <= lower, f"{path.relative_to(ROOT)} imports {', '.join(imports(path) - lower)}"
