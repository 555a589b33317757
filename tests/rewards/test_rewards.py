"""Rewards: what is right, what only looks right, and that nothing ever raises."""

import subprocess
import sys
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vtfast.data import Sample
from vtfast.rewards import REWARDS, accuracy_reward, format_reward, get_reward, length_reward
from vtfast.utils.errors import UserError


def asked(answer: str, *others: str) -> Sample:
    return Sample(question="?", options=[answer, *others], answer=answer, images=[])


SIDE = asked("left", "right")
COUNT = asked("3", "2", "6", "4", "5")


@pytest.mark.parametrize(
    "answer", ["left", "Left", " LEFT. ", "\nleft\n", "**left**", '"left"', "(left)", "left!", "“left”"]
)
def test_right_answers(answer):
    assert accuracy_reward(f"so.</think>\n<answer>{answer}</answer>", SIDE) == 1.0


@pytest.mark.parametrize(
    "answer", ["right", "", "left or right", "left, right", "right left", "not left", "le ft", "lefty"]
)
def test_wrong_and_hedged_answers(answer):
    assert accuracy_reward(f"so.</think>\n<answer>{answer}</answer>", SIDE) == 0.0


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("left", 0.0),
        ("<answer>left", 0.0),
        ("left</answer>", 0.0),
        ("It is left.</think> <answer>right</answer>", 0.0),
        ("<answer>left</answer> <answer>right</answer>", 0.0),
        ("<answer>right</answer> <answer>left</answer>", 1.0),
        ("<answer>left</answer> <answer>right", 1.0),
        ("<answer>right <answer>left</answer>", 1.0),
        ("</answer><answer>left</answer>", 1.0),
        ("</answer><answer>left", 0.0),
        ("<ANSWER>left</ANSWER>", 0.0),
    ],
)
def test_only_the_last_whole_answer_counts(completion, reward):
    assert accuracy_reward(completion, SIDE) == reward


def test_white_space_inside_an_option():
    sample = asked("in front", "further away")
    assert accuracy_reward("<answer>In\n  front</answer>", sample) == 1.0
    assert accuracy_reward("<answer>in front of it</answer>", sample) == 0.0


NUMBERS = ["3", "3.", "3.0", "03", "+3", "6/2", r"\boxed{3}", r"\frac{6}{2}", "$3$", "3 chairs", "(3)"]


@pytest.mark.parametrize("answer", NUMBERS)
def test_equal_numbers(answer):
    assert accuracy_reward(f"<answer>{answer}</answer>", COUNT) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        *("4", "-3", ".3", "33", "3 or 4", "4 or 3", "3, 4", "4, 3", "3 4", "2-3", "2 to 3"),
        *("not 3", "at least 3", "less than 3", "7 or 3", "no 3", "3 of 5", "", "many"),
        *("9**9**9**9", "9^9^9^9", "99999999!", r"\Gamma(99999999)", "3." + "0" * 5000, "0+" * 2000 + "3"),
    ],
)
def test_other_numbers_and_hedges(answer):
    assert accuracy_reward(f"<answer>{answer}</answer>", COUNT) == 0.0


def test_signs_and_points_are_part_of_a_number():
    assert accuracy_reward("<answer>-3</answer>", asked("-3", "3")) == 1.0
    assert accuracy_reward("<answer>3</answer>", asked("-3", "3")) == 0.0
    assert accuracy_reward("<answer>.5</answer>", asked("0.5", "5")) == 1.0
    assert accuracy_reward("<answer>.5</answer>", asked("5", "0.5")) == 0.0
    assert accuracy_reward("<answer> .5 cm</answer>", asked("5", "6")) == 0.0
    assert accuracy_reward("<answer>1,000</answer>", asked("1000", "1")) == 1.0


def test_an_option_of_punctuation_only():
    assert accuracy_reward("<answer> ? </answer>", asked("?", "!")) == 1.0
    assert accuracy_reward("<answer>!</answer>", asked("?", "!")) == 0.0


def test_numbers_are_compared_in_any_thread():
    """Reward workers may be threads, where math_verify's own time limit cannot run."""
    found = []
    work = threading.Thread(target=lambda: found.append(accuracy_reward("<answer>3.00</answer>", COUNT)))
    work.start()
    work.join()
    assert found == [1.0]


def test_math_verify_is_loaded_only_for_numbers():
    code = """
import sys
from types import SimpleNamespace as Sample
from vtfast.rewards import accuracy_reward
side = Sample(answer="left", options=["left", "right"])
count = Sample(answer="3", options=["3", "4"])
assert accuracy_reward("<answer>right</answer>", side) == 0.0
assert accuracy_reward("<answer>3</answer>", count) == 1.0
assert "math_verify" not in sys.modules and "transformers" not in sys.modules
assert accuracy_reward("<answer>3.0</answer>", count) == 1.0
assert "math_verify" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("a</think><answer>b</answer>", 1.0),
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n a\nb </think>\n\n<answer>\nb\n</answer>\n", 1.0),
        ("</think><answer></answer>", 1.0),
        ("a</think> so <answer>b</answer>", 0.0),
        ("a</think><answer>b</answer> done", 0.0),
        ("a<answer>b</answer></think>", 0.0),
        ("a</think><answer>b", 0.0),
        ("a<answer>b</answer>", 0.0),
        ("b", 0.0),
        ("", 0.0),
        ("a</think>a</think><answer>b</answer>", 0.0),
        ("<think><think>a</think><answer>b</answer>", 0.0),
        ("a<think>a</think><answer>b</answer>", 0.0),
        ("a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("a</think><answer><answer>b</answer>", 0.0),
        ("a</think><answer>b</answer></answer>", 0.0),
        ("a</THINK><answer>b</answer>", 0.0),
    ],
)
def test_format(completion, reward):
    assert format_reward(completion, SIDE) == reward


def test_length():
    assert length_reward("one two\nthree", SIDE) == pytest.approx(0.003)
    assert length_reward("one two\nthree", SIDE, tokens=700) == pytest.approx(0.7)
    assert length_reward("", SIDE) == 0.0


PIECES = [
    *("<think>", "</think>", "<answer>", "</answer>", "left", " or ", "3", "4", "-", ".", "/"),
    *("\\frac{", "}", "\\sqrt", "(", "$", "^", "%", "=", ",", "\n", "e", "i", "oo", "\x00", "½"),
]
PROSE = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


@settings(max_examples=300, deadline=None)
@given(PROSE, PROSE, st.sampled_from(["left", "3", "-0.5", "", "1,000", "?", "٣"]))
@example("</think><answer>", "3/0", "3")
@example("<answer>", "\\frac{3}{0}", "3")
def test_no_text_makes_a_reward_raise(before, inside, gold):
    sample = asked(gold, "right", "4")
    for completion in (before + inside, f"{before}<answer>{inside}</answer>"):
        for reward in REWARDS.values():
            assert isinstance(value := reward(completion, sample), float)
            assert reward not in (accuracy_reward, format_reward) or value in (0.0, 1.0)


@pytest.mark.parametrize("odd", [None, 3, ["left"]])
def test_no_value_makes_a_reward_raise(odd):
    for reward in REWARDS.values():
        assert isinstance(reward(odd, SIDE), float)
    for reward in (accuracy_reward, format_reward, length_reward):
        assert reward(odd, SIDE) == 0.0
    assert accuracy_reward("<answer>left</answer>", odd) == 0.0
    assert accuracy_reward("<answer>3.0</answer>", Sample("?", [None], "3", [])) == 0.0


def test_a_module_in_the_current_folder_is_found_after_those_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lies_here.py").write_text("def half(completion, sample): return 0.5")
    (tmp_path / "colorsys.py").write_text("def rgb_to_hsv(completion, sample): return 0.5")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert get_reward("lies_here:half")("", SIDE) == 0.5
    assert get_reward("colorsys:rgb_to_hsv")(0, 0, 0) == (0.0, 0.0, 0)


def test_rewards_by_name(tmp_path, monkeypatch):
    named = {"accuracy": accuracy_reward, "format": format_reward, "length": length_reward}
    assert {name: get_reward(name) for name in named} == named
    (tmp_path / "my_rewards.py").write_text("def half(completion, sample): return 0.5\nlimit = 3")
    monkeypatch.syspath_prepend(tmp_path)
    assert get_reward("my_rewards:half")("", SIDE) == 0.5
    with pytest.raises(UserError, match="did you mean 'accuracy'"):
        get_reward("acuracy")
    with pytest.raises(UserError, match="no_such_module"):
        get_reward("no_such_module:half")
    with pytest.raises(UserError, match="whole"):
        get_reward("my_rewards:whole")
    with pytest.raises(UserError, match="not a function but int"):
        get_reward("my_rewards:limit")
