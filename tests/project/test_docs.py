"""The documentation builds without a warning, opens in a browser, and names files, flags and imports that exist."""

import functools
import html
import importlib
import json
import re
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "pages"
NAMES = sorted(path.stem for path in PAGES.glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("docs") / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "-f", "docs/mkdocs.yml", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def served(site):
    """The address of a local server of the built site."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Print nothing."""


def test_every_page_opens_with_its_pictures_and_requests_nothing_from_outside(served, chromium):
    for name in NAMES:
        chromium.get_log("performance")
        chromium.get(f"{served}/{name}.html")
        broken = chromium.execute_script(
            "return [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
        )
        assert broken == [], name
        assert len(chromium.find_element("tag name", "article").text) > 300, f"{name} is empty"
        events = [json.loads(e["message"])["message"] for e in chromium.get_log("performance")]
        requested = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert not [url for url in requested if url.startswith("http") and not url.startswith(served)], name
        severe = [e for e in chromium.get_log("browser") if e["level"] == "SEVERE"]
        assert severe == [], name


def test_the_search_finds_a_setting(served, chromium):
    from selenium.webdriver.support.ui import WebDriverWait

    chromium.get(f"{served}/index.html")
    box = chromium.find_element("css selector", "input.md-search__input")
    chromium.execute_script("document.getElementById('__search').click()")
    WebDriverWait(chromium, 20).until(lambda page: box.is_displayed())
    box.send_keys("rollout_max_rows")
    links = WebDriverWait(chromium, 20).until(
        lambda page: [
            link.get_attribute("href") for link in page.find_elements("css selector", "a.md-search-result__link")
        ]
    )
    assert any("settings.html" in href for href in links)


def test_every_setting_and_every_public_name_is_documented(site):
    from vtfast.config import field_names

    settings = (site / "settings.html").read_text()
    for name in field_names():
        assert f"--{name}<" in settings, name
    for page in ("python", "kernels"):
        for name in re.findall(r"^::: (\S+)", (PAGES / f"{page}.md").read_text(), re.MULTILINE):
            assert f'id="{name}"' in (site / f"{page}.html").read_text(), name


def test_formulas_become_mathml(site):
    page, source = (site / "loss.html").read_text(), (PAGES / "loss.md").read_text()
    blocks = source.count("$$") // 2
    inline = len(re.findall(r"\$[^$]+\$", source.replace("$$", "")))
    assert page.count('display="block"') == blocks and page.count('display="inline"') == inline
    assert "arithmatex" not in page and "$" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_the_examples_are_on_their_page(site):
    """They are included from their files; a formatter that takes the include marker for Python breaks it silently."""
    shown = html.unescape(re.sub(r"<[^>]+>", "", (site / "elsewhere.html").read_text()))
    for example in (ROOT / "docs" / "examples").glob("*.py"):
        assert example.read_text().strip() in shown, example.name


def test_files_that_the_pages_name_exist():
    """`vtfast/x.py`, `tests/y.py`, `kernels/z.py`, `bench/…` and `docs/…` in any page."""
    for page in [*PAGES.glob("*.md"), ROOT / "README.md"]:
        for name in re.findall(r"`((?:vtfast|kernels|tests|bench|docs)/[\w./-]*)`", page.read_text()):
            if "NAME" not in name:
                assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_imports_in_the_pages_work():
    pattern = r"^(?:from (vtfast\S*) import ([\w, ]+)|import (vtfast\S*))"
    for page in PAGES.glob("*.md"):
        for module, names, plain in re.findall(pattern, page.read_text(), re.MULTILINE):
            imported = importlib.import_module(module or plain)
            for name in filter(None, names.split(", ")):
                assert hasattr(imported, name), f"{page.name}: from {module} import {name}"


def test_flags_in_the_commands_of_the_pages_exist():
    """Of `python train.py`, `vtfast COMMAND` and `python -m bench`, in the blocks that are shell."""
    known = known_flags()
    for page in PAGES.glob("*.md"):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.search(r"(train\.py|\bvtfast \S+)(.*)", line.split(" #")[0])
                if command:
                    assert set(re.findall(r"--([\w-]+)", command[2])) <= known, f"{page.name}: {line}"


def known_flags() -> set[str]:
    from vtfast.config import field_names

    return {*field_names(), "recipe", "config", "dry-run", "gpu_memory_gb", "help_all", "rows", "output", "bench"}


def test_the_metrics_page_is_the_table_of_the_code():
    """Each key of `METRICS` has its row in docs/pages/metrics.md with the same words; the page has no other row."""
    from vtfast.training.metrics import METRICS

    rows = [f"| `{key}` | {meaning} |" for key, meaning in METRICS.items()]
    page = (PAGES / "metrics.md").read_text().replace("\\|", "|").splitlines()
    assert [line for line in page if line.startswith("| `")] == rows
