"""The report in a real browser: Chromium, driven by selenium. Skipped where either is missing."""

import itertools
import json
import re

import pytest
from make_runs import completion_row, hostile_run, metrics_row, write_run

from vtfast.report import write_report

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

HOSTILE = (
    "<script>alert(1)</script></script><img src=x onerror=alert(2)><!-- \u2028 "
    "<svg onload=alert(3)><a href='javascript:alert(4)'>x</a> <style>body{display:none}</style>"
)
SCORES = {
    f"step-{step}": {"cvbench": {"total": total, "by_task": {"Count": 0.5}, "count": 2638}}
    for step, total in ((0, 0.3), (20, 0.5), (40, 0.6))
}


def completions():
    """40 steps of 3. Reflection starts at step 30; the second of step 7 is hostile."""
    for step in range(1, 41):
        text = "Wait, it is the left one." if step >= 30 else "It is the left one."
        yield completion_row(step, f"<think>{text}", reward=0.0, length=step, advantage=-1.0)
        yield completion_row(step, HOSTILE if step == 7 else "<think>plain", length=100 - step)
        yield completion_row(step, f"<think>needle{step}", kind="depth", reward=2.0, length=500 + step)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of one run, of three that froze different parts (one has barely begun), and of a longer one."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [metrics_row(step, entropy=None if step == 10 else 0.5) for step in range(1, 41)]
    one = write_run(folder / "one", rows, completions(), SCORES, max_steps=40)
    two = write_run(folder / "two", rows[:20], list(completions())[:30], freeze=["vision"])
    bare = write_run(folder / "bare", freeze=["language"])
    with (two / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "rew')
    long = write_run(folder / "long", [metrics_row(step, kl=step % 2) for step in range(1, 201)])
    return {
        "one": write_report([one]),
        "three": write_report([one, two, bare], folder / "3.html"),
        "long": write_report([long]),
        "hostile": write_report([hostile_run(folder / "hostile", HOSTILE), one], folder / "h.html"),
    }


@pytest.fixture
def opened(chromium, pages):
    """Opens a page; afterwards there must be no console message, no open dialog and no request but for the file."""

    def open_page(name="one", width=1200, scheme="light"):
        resize(chromium, width)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            # A page that glides is hard to click on.
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        chromium.get(pages[name].as_uri())
        WebDriverWait(chromium, 10).until(lambda page: page.find_elements(By.CSS_SELECTOR, "svg"))
        return chromium

    chromium.get_log("performance")
    yield open_page
    assert chromium.get_log("browser") == []
    assert requests(chromium) == {chromium.current_url}


def resize(chromium, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def requests(chromium) -> set[str]:
    """Addresses that our pages asked for, their own among them; the browser's start page asks for others."""
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return {request["request"]["url"] for request in sent if request["documentURL"].startswith("file:")}


def all_of(page, selector):
    return page.find_elements(By.CSS_SELECTOR, selector)


def the(page, selector):
    return page.find_element(By.CSS_SELECTOR, selector)


def shown(page) -> int:
    """How many completions match, as the page says."""
    text = the(page, ".count").text
    return 0 if text.startswith("No ") else int(text.split()[0].replace(",", ""))


def steps(page) -> list[int]:
    headers = [header.text.split("·")[0] for header in all_of(page, ".completion header span:first-child")]
    return [int(header.replace("step", "")) for header in headers]


def set_slider(page, value: int) -> None:
    slider = the(page, "#step")
    slider.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * value)


def test_every_section_and_its_charts_are_there(opened):
    page = opened()
    headings = [heading.text for heading in all_of(page, "h2")]
    assert headings == [
        "Overview",
        "Accuracy and length",
        "Training",
        "Time and speed",
        "Evaluations",
        "Reflection",
        "Completions",
        "All settings",
    ]
    assert the(page, "h1").text == "one" and "finished, 40 steps" in the(page, "header p").text
    charts = {chart.find_element(By.TAG_NAME, "figcaption").text: chart for chart in all_of(page, "figure.chart")}
    assert {"Benchmark accuracy %", "Response length tokens", "Reward", "Time of a step by phase seconds"} <= set(
        charts
    )
    assert all(chart.find_elements(By.CSS_SELECTOR, "path.curve, polygon.area") for chart in charts.values())
    assert "Zero at every step: clipped tokens." in the(page, "#training").text
    assert "59.47" in the(page, "#evaluations").text and "60.00" in the(page, "#evaluations").text


def test_a_chart_is_to_scale(opened):
    """Length grows by 1 a step from 101: the curve is a straight line from the lower left to the upper right."""
    page = opened()
    (line,) = all_of(page, "svg[aria-label^='Response length'] path.curve")
    points = [tuple(map(float, pair.split(","))) for pair in line.get_attribute("d")[1:].split("L")]
    labels = {text.text: text.location["y"] for text in all_of(page, "svg[aria-label^='Response length'] text")}
    assert len(points) == 40 and points[0][0] < points[-1][0] and points[0][1] > points[-1][1]
    pixels = (points[0][1] - points[-1][1]) / 39
    assert pixels == pytest.approx((labels["0"] - labels["150"]) / 150, rel=0.02)
    slopes = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert max(slopes) - min(slopes) < 0.03


def test_an_unknown_value_is_a_gap(opened):
    (line,) = all_of(opened(), "svg[aria-label^='Entropy'] path.curve")
    assert [part.count(",") for part in line.get_attribute("d").split("M")[1:]] == [9, 30]


def test_a_long_line_has_a_running_mean(opened):
    """A value that jumps between 0 and 1 has a mean near 0.5."""
    paths = all_of(opened("long"), "svg[aria-label^='KL'] path.curve")
    raw, smooth = ([float(y) for y in re.findall(r",([\d.]+)", path.get_attribute("d"))] for path in paths)
    middle, height = (min(raw) + max(raw)) / 2, max(raw) - min(raw)
    assert len(raw) == len(smooth) == 200 and height > 100
    assert all(abs(y - middle) < 0.2 * height for y in smooth)


def test_the_areas_of_a_stack_lie_upon_each_other(opened):
    """Phases of 2, 0.5, 1 and 0.5 seconds at every step."""
    page = opened()
    areas = all_of(page, "svg[aria-label^='Time of a step'] polygon")
    corners = [area.get_attribute("points").split() for area in areas]
    tops, bottoms = ([float(points[i].split(",")[1]) for points in corners] for i in (0, -1))
    assert tops[:-1] == bottoms[1:]
    second = (bottoms[0] - tops[0]) / 2
    heights = [(bottom - top) / second for bottom, top in zip(bottoms, tops, strict=True)]
    assert heights == pytest.approx([2, 0.5, 1, 0.5], abs=0.01)


def test_values_under_the_pointer_and_by_keyboard(opened):
    page = opened()
    chart = the(page, "svg[aria-label^='Benchmark accuracy']")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    ActionChains(page).move_to_element(chart).perform()
    tooltip = chart.find_element(By.XPATH, "../div[@class='tooltip']")
    assert tooltip.text.splitlines() == ["step 20", "CV-Bench 50.0 %"]
    ActionChains(page).move_to_element(the(page, "h1")).perform()
    assert not tooltip.is_displayed()
    chart.send_keys(Keys.ARROW_LEFT)
    assert tooltip.text.splitlines() == ["step 40", "CV-Bench 60.0 %"]
    chart.send_keys(Keys.HOME)
    assert tooltip.text.splitlines() == ["step 0", "CV-Bench 30.0 %"]
    chart.send_keys(Keys.END)
    assert tooltip.text.splitlines() == ["step 40", "CV-Bench 60.0 %"]
    chart.send_keys(Keys.ESCAPE)
    assert not tooltip.is_displayed()


def test_what_the_model_wrote_is_text(opened):
    page = opened()
    set_slider(page, 7)
    texts = [pre.get_attribute("textContent") for pre in all_of(page, ".completion pre")]
    assert HOSTILE in texts
    assert not all_of(page, ".completion :is(script, img, svg, a, style)")
    assert len(all_of(page, "script")) == 2
    assert page.execute_script("return getComputedStyle(document.body).display") == "block"


def test_search_narrows_and_marks(opened):
    page = opened()
    assert shown(page) == 120 and len(all_of(page, ".completion")) == 20
    the(page, "#search").send_keys("NEEDLE3")
    WebDriverWait(page, 5).until(lambda page: shown(page) == 11)
    assert {mark.text for mark in all_of(page, "mark.found")} == {"needle3"}
    the(page, "#search").clear()
    the(page, "#search").send_keys("alert(1)")
    WebDriverWait(page, 5).until(lambda page: shown(page) == 1)
    assert {mark.text for mark in all_of(page, "mark.found")} == {"alert(1)"}
    the(page, "#search").clear()
    the(page, "#search").send_keys("</think>.*(")
    WebDriverWait(page, 5).until(lambda page: shown(page) == 0)
    assert not all_of(page, ".completion")


def test_the_slider_chooses_a_step(opened):
    page = opened()
    assert the(page, "output").text == "all steps"
    set_slider(page, 31)
    assert the(page, "output").text == "step 31" and steps(page) == [31, 31, 31]
    assert [mark.text for mark in all_of(page, "mark.reflects")][-1:] == ["Wait"]
    the(page, "#step").send_keys(Keys.ARROW_LEFT)
    assert steps(page) == [30, 30, 30]


def test_sorting_filtering_and_showing_more(opened):
    page = opened()
    sort = Select(the(page, "#sort"))
    sort.select_by_visible_text("step, last to first")
    assert steps(page)[:4] == [40, 40, 40, 39]
    sort.select_by_visible_text("length, shortest first")
    assert steps(page)[:3] == [1, 2, 3]
    sort.select_by_visible_text("length, longest first")
    assert steps(page)[:3] == [40, 39, 38]
    sort.select_by_visible_text("reward, worst first")
    assert {reward.text for reward in all_of(page, ".completion .reward")} == {"reward 0"}
    sort.select_by_visible_text("reward, best first")
    assert {reward.text for reward in all_of(page, ".completion .reward")} == {"reward 2"}
    Select(the(page, "#kind")).select_by_visible_text("depth")
    assert shown(page) == 40 and the(page, "#more").text == "Show 20 more of 20"
    the(page, "#more").click()
    assert len(all_of(page, ".completion")) == 40 and not the(page, "#more").is_displayed()
    the(page, "#reflecting").click()
    assert shown(page) == 0


def test_a_completion_is_shown_with_all_that_belongs_to_it(opened):
    page = opened()
    set_slider(page, 1)
    text = all_of(page, ".completion")[0].text
    for part in (
        "step 1 · count",
        "reward 0",
        "How many chairs?",
        "Right answer: 3",
        "<think>It is the left one.",
        "accuracy 0",
        "format 1",
        "advantage -1",
        "tokens 1",
        "finish: stop",
    ):
        assert part in text


def test_reflection_is_dated_and_found(opened):
    page = opened()
    assert "First seen at step 30: 33.3%" in the(page, ".dated").text
    the(page, ".jump").click()
    assert shown(page) == 1 and steps(page) == [30]


def test_several_runs_side_by_side(opened):
    page = opened("three")
    legend = the(page, "#figure-1 figure.chart:last-child .legend").text.splitlines()
    assert legend == ["nothing frozen", "vision encoder frozen"], "the run that has no step has no line"
    settings = the(page, "#settings").text
    assert "freeze" in settings and "max_steps" in settings and "num_generations" not in settings
    assert "two: metrics.jsonl: 1 unreadable line(s) left out." in the(page, ".notes").text
    assert "bare: None seen" not in the(page, ".dated").text and "No completions" in the(page, ".dated").text
    Select(the(page, "#run")).select_by_visible_text("two")
    assert shown(page) == 30 and "two · step 1" in the(page, ".completion").text


@pytest.mark.parametrize("name", ["one", "three"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(opened, name, scheme):
    page = opened(name, width=1200, scheme=scheme)
    resize(page, 400)
    widest = "return Math.max(...[...document.querySelectorAll('svg')].map((svg) => svg.clientWidth))"
    WebDriverWait(page, 5).until(lambda page: 200 < page.execute_script(widest) < 400)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 400
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(18, 20, 24)") == (scheme == "dark")
    unlabelled = page.execute_script(
        "return [...document.querySelectorAll('input, select')].filter((field) => !field.labels.length).length"
    )
    assert unlabelled == 0


def test_hostile_text_is_text_wherever_a_run_can_have_some(opened):
    page = opened("hostile")
    assert not all_of(page, "img, iframe, object, embed, form[action], a[href^='javascript']")
    assert len(all_of(page, "script")) == 2 and len(all_of(page, "style")) == 1
    assert page.execute_script("return document.body.textContent").count("<script>alert(1)") >= 8


def test_where_scripts_are_not_allowed(chromium, pages):
    """The page says what it needs."""
    chromium.get_log("browser")
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.get(pages["one"].as_uri())
        source = chromium.page_source
        errors = [line["message"] for line in chromium.get_log("browser")]
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "This page needs JavaScript" in source
    assert not errors
