"""The recipe mode decides as VisualThinker's code does, accidents included.

The expected values follow from the rules in `vtfast/rewards/visualthinker.py`, by hand; math-verify 0.5.2 agrees with
every row.
"""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtfast.data import Sample
from vtfast.rewards import get_reward, strict
from vtfast.rewards.visualthinker import accuracy_reward, format_reward, may_use_math_verify

# gold, completion behind a prompt that ends with <think>, accuracy, format
DECISIONS = [
    # equality, letter by letter, inside the first tag
    ("left", "so.</think>\n<answer>left</answer>", 1, 1),
    ("left", "so.</think><answer> left </answer>", 1, 1),
    ("left", "so.</think><answer>Left</answer>", 0, 1),
    ("left", "so.</think><answer>left.</answer>", 0, 1),
    ("left", "so.</think><answer>**left**</answer>", 0, 1),
    ("left", 'so.</think><answer>"left"</answer>', 0, 1),
    ("left", "so.</think><answer>the left</answer>", 0, 1),
    ("left", "so.</think><answer>left or right</answer>", 0, 1),
    ("left", "so.</think><answer></answer>", 0, 1),
    ("in front", "so.</think><answer>in  front</answer>", 0, 1),
    ("Yes", "so.</think><answer>Yes</answer>", 1, 1),
    ("Yes", "so.</think><answer>yes</answer>", 0, 1),
    # the first of several answers
    ("left", "so.</think><answer>left</answer><answer>right</answer>", 1, 1),
    ("left", "so.</think><answer>right</answer><answer>left</answer>", 0, 1),
    ("left", "<answer>left</answer> no.</think><answer>right</answer>", 1, 1),
    ("left", "so.</think><answer>right <answer>left</answer>", 0, 1),
    # a tag that spans lines is not seen: the whole completion is compared
    ("left", "so.</think>\n<answer>\nleft\n</answer>", 0, 1),
    ("left", "so.</think>\n<answer>left\n</answer>", 0, 1),
    ("left", "so.</think><answer>\nright</answer> <answer>left</answer>", 1, 1),
    # no tag at all: the whole completion is the answer
    ("left", "left", 1, 0),
    ("left", " \nleft\n ", 1, 0),
    ("left", "It is left", 0, 0),
    ("left", "<answer>left", 0, 0),
    ("left", "left</answer>", 0, 0),
    ("left", "", 0, 0),
    # the last lone letter from A to H, left over from another data set
    ("A", "so.</think><answer>A</answer>", 1, 1),
    ("A", "so.</think><answer>(A)</answer>", 1, 1),
    ("A", "so.</think><answer>[A]</answer>", 1, 1),
    ("A", "so.</think><answer>point A</answer>", 1, 1),
    ("A", "so.</think><answer>A is closer</answer>", 1, 1),
    ("A", "so.</think><answer>(A) left</answer>", 1, 1),
    ("A", "so.</think><answer>B or A</answer>", 1, 1),
    ("A", "so.</think><answer>A or B</answer>", 0, 1),
    ("A", "so.</think><answer>B A</answer>", 0, 1),  # the space belongs to B, and A has none before it
    ("A", "so.</think><answer>A.</answer>", 0, 1),
    ("A", "so.</think><answer>a</answer>", 0, 1),
    ("I", "so.</think><answer>(I)</answer>", 0, 1),
    ("H", "so.</think><answer>(H)</answer>", 1, 1),
    ("A", "I think A", 1, 0),
    ("A", "I think A or B\n", 0, 0),
    ("point A", "so.</think><answer>A</answer>", 0, 1),
    ("point A", "so.</think><answer>point A</answer>", 1, 1),
    # math-verify finds no number in <answer>3</answer>, so counts are compared as text as well
    ("3", "so.</think><answer>3</answer>", 1, 1),
    ("3", "so.</think><answer>3.0</answer>", 0, 1),
    ("3", "so.</think><answer>3 chairs</answer>", 0, 1),
    ("3", "so.</think><answer>\n3\n</answer>", 0, 1),
    ("3", "so there are 3", 0, 0),
    ("3", "3", 1, 0),
    ("3", "so.</think><answer>$3$</answer>", 0, 1),
    ("-3", "so.</think><answer>-3</answer>", 1, 1),
    # where it finds one, any text pays for the completion's rightmost number
    ("turned by 30 degrees", "so.</think><answer>turned by 30 degrees</answer>", 1, 1),
    ("turned by 30 degrees", "so.</think><answer>moved by 30 metres</answer>", 1, 1),
    ("turned by 30 degrees", "I see 30 chairs", 1, 0),
    ("turned by 30 degrees", "First 20, then 30", 1, 0),
    ("turned by 30 degrees", "First 30, then 20", 0, 0),
    ("turned by 30 degrees", "30</think>\n<answer>\nturned\n</answer>", 1, 1),
    ("turned by 30 degrees", "Maybe 20 or 25.</think><answer>30</answer>", 0, 1),
    ("turned by 30 degrees", "Maybe 20 or 25.</think><answer> 30 </answer>", 1, 1),
    ("turned by 30 degrees", "x = 60/2 ok", 1, 0),
    ("turned by 30 degrees", "30.0 it is", 1, 0),
    ("turned by 30 degrees", "a30", 0, 0),
    ("turned by 30 degrees", "30 but the answer is 20", 0, 0),
    ("turned by 30 degrees", "the answer is 30 and not 20", 1, 0),
    ("moved 0.5 m", "1/2 of it", 1, 0),
    ("moved 0.5 m", "so.</think><answer>moved 0.50 m</answer>", 1, 1),
    ("$3$", "I see 3", 1, 0),
    ("$3$", "so.</think><answer>$3$</answer>", 1, 1),
    (r"\frac{3}{4}", "0.75", 1, 0),
    (r"\frac{3}{4}", r"\frac{6}{8} $0.5$", 0, 0),
    ("see [x] there", "$x$", 1, 0),
    # swapped arguments: an equation as the solution is cut to its right side, one in the completion is not
    ("$x^2 = 9$", "$9$", 1, 0),
    ("$9$", "$x^2 = 9$", 0, 0),
    (r"$(-\infty, 3)$", "$x < 3$", 1, 0),
    ("$x < 3$", r"$(-\infty, 3)$", 0, 0),
    # the format: from the first character to the last
    ("left", "so.</think>\n\n <answer>left</answer>", 1, 1),
    ("left", "so.</think><answer>left</answer>\n", 1, 0),
    ("left", "so.</think><answer>left</answer> ", 1, 0),
    ("left", "so.</think><answer>left</answer>.", 1, 0),
    ("left", "so.</think> so <answer>left</answer>", 1, 0),
    ("left", "so.<answer>left</answer>", 1, 0),
    ("left", "so.</think><answer>left", 0, 0),
    ("left", "<answer>left</answer></think>", 1, 0),
    ("left", "</think><answer></answer>", 0, 1),
    ("left", "so.</think>so.</think><answer>left</answer>", 1, 1),
    ("left", "<think>so.</think><answer>left</answer>", 1, 1),
    ("left", "so.</THINK><answer>left</answer>", 1, 0),
    ("left", " so.\n</think><answer>left</answer> well <answer>left</answer>", 1, 1),
]


@pytest.mark.parametrize(("gold", "completion", "accuracy", "form"), DECISIONS)
def test_the_originals_decisions(gold, completion, accuracy, form):
    sample = Sample("?", [], gold, [])
    assert accuracy_reward(completion, sample) == accuracy
    assert format_reward(completion, sample) == form
    # the trainer hands over the whole response and says what of it the prompt wrote
    assert accuracy_reward("<think>" + completion, sample, prefix="<think>") == accuracy
    assert format_reward("<think>" + completion, sample, prefix="<think>") == form


def test_a_prompt_that_writes_nothing_of_the_response():
    """The instruct prompt: the tag is the model's own to write, and part of what is read."""
    sample = Sample("?", [], "left", [])
    assert format_reward("so.</think><answer>left</answer>", sample, prefix="") == 0
    assert format_reward("<think>so.</think><answer>left</answer>", sample, prefix="") == 1
    assert accuracy_reward("<think>left", sample, prefix="") == 0
    assert accuracy_reward("<think>left", sample) == 1
    count = Sample("?", [], "turned by 30 degrees", [])
    assert accuracy_reward("<think>30", count, prefix="") == 0  # no space before the number
    assert accuracy_reward("<think>30", count) == 1


def test_a_gold_over_two_lines_is_compared_with_its_tags():
    sample = Sample("?", [], "left\nside", [])
    assert accuracy_reward("left\nside", sample) == 0
    assert accuracy_reward("<answer>left\nside</answer>", sample) == 1


@given(st.text(st.characters(exclude_categories=["Nd", "Cs"], exclude_characters="$\\[")))
def test_math_verify_sees_nothing_in_golds_that_it_is_not_asked_about(gold):
    from math_verify import parse

    assert not may_use_math_verify(Sample("?", [], gold, []))
    assert parse(f"<answer>{gold}</answer>", parsing_timeout=None) == []


def test_math_verify_is_asked_in_any_thread():
    found, sample = [], Sample("?", [], "turned by 30 degrees", [])
    work = threading.Thread(target=lambda: found.append(accuracy_reward("30", sample)))
    work.start()
    work.join()
    assert found == [1.0]


def test_the_modes_by_name():
    assert get_reward("accuracy", "recipe") is accuracy_reward
    assert get_reward("format", "recipe") is format_reward
    assert get_reward("length", "recipe") is strict.length_reward
    assert get_reward("accuracy") is strict.accuracy_reward


# What the strict mode decides otherwise, in the order of the list in vtfast/rewards/strict.py.
DIFFERENCES = [
    ("accuracy", "left", "</think><answer>right</answer><answer>left</answer>", 1, 0),
    ("accuracy", "left", "</think><answer>left</answer><answer>right</answer>", 0, 1),
    ("accuracy", "left", "left", 0, 1),
    ("accuracy", "left", "</think><answer>\nleft\n</answer>", 1, 0),
    ("accuracy", "left", "</think><answer>Left.</answer>", 1, 0),
    ("accuracy", "3", "</think><answer>3.0</answer>", 1, 0),
    ("accuracy", "turned by 30 degrees", "It is 30.</think><answer>left</answer>", 0, 1),
    ("accuracy", "A", "</think><answer>B or A</answer>", 0, 1),
    ("format", "left", "</think><answer>left</answer><answer>left</answer>", 0, 1),
    ("format", "left", "so</think>so</think><answer>left</answer>", 0, 1),
    ("format", "left", "</think><answer>left</answer>\n", 1, 0),
]


@pytest.mark.parametrize(("reward", "gold", "completion", "strictly", "originally"), DIFFERENCES)
def test_where_the_modes_differ(reward, gold, completion, strictly, originally):
    sample = Sample("?", [gold, "right", "B", "4"], gold, [])
    assert get_reward(reward, "strict")(completion, sample) == strictly
    assert get_reward(reward, "recipe")(completion, sample) == originally
