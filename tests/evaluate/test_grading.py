"""The two scorers on responses that show their rules."""

import time

import pytest

from vtfast.evaluate.grading import paper_correct, strict_correct

SIDE = ["left", "right"]
COUNT = ["3", "2", "1", "0"]
DEPTH = ["A is closer", "B is closer"]
DOOR = ["door (highlighted by a red box)", "lamp"]

# What the study's own line decides with math-verify 0.5.2: the letter whose option a response is right for, if any.
PAPER = [
    # letters
    (SIDE, "A", "A"),
    (SIDE, "b", "B"),
    (SIDE, "(A)", "A"),
    (SIDE, "(b)", "B"),
    (SIDE, "( A )", "A"),
    (SIDE, "A.", "A"),
    (SIDE, "B:", "B"),
    (SIDE, "**B**", "B"),
    (SIDE, "**(B)**.", "B"),
    (SIDE, "so [B] it is", "B"),
    (SIDE, "[B]", ""),
    (SIDE, "A)", ""),
    (SIDE, "B!", ""),
    (SIDE, "`B`", ""),
    (SIDE, "C", ""),
    (SIDE, "e", ""),
    # option texts, in the case of the option alone
    (SIDE, "left", "A"),
    (SIDE, "right.", "B"),
    (SIDE, "the left one", "A"),
    (SIDE, "Left", ""),
    (SIDE, "LEFT", ""),
    (SIDE, "right!", ""),
    (SIDE, "lefty", ""),
    (["Left", "Right"], "Left", "A"),
    (["Left", "Right"], "left", ""),
    (DOOR, "door", ""),
    (DOOR, "the door (highlighted by a red box).", "A"),
    (DEPTH, "A is closer to the camera", "A"),
    (DEPTH, "<answer>point B is closer.</answer>", "B"),
    (DEPTH, "closer: A", "A"),
    (["Left", "left"], "Left", "AB"),  # what is parsed is lower case
    (["big 3", "3"], "the big 3", "A"),  # of two that end together, the longer
    # which one, if there are several: the first word, else the last
    (SIDE, "left or right", "A"),
    (SIDE, "right, not left", "B"),
    (SIDE, "A. left, B. right", "A"),
    (SIDE, "(B) right", "B"),
    (SIDE, "B) right", "B"),
    (SIDE, "B is what a person says", "B"),
    (SIDE, "not left, but right", "B"),
    (SIDE, "so it is left\nright", "A"),  # the line feed ends "left" and is not there for "right"
    # the article is the letter A
    (SIDE, "I see a dog", "A"),
    (SIDE, "It is to the right of a dog", "A"),
    (SIDE, "It is on a shelf to the right", "B"),
    (SIDE, "<answer>I think a</answer>", "A"),
    # the word "answer" before it
    (SIDE, "The answer is left", "A"),
    (SIDE, "Answer: right because left is wrong", "B"),
    (SIDE, "Answer: B. Not A.", "B"),
    (SIDE, "left, no: the answer is right, as a rule", "B"),
    (SIDE, "The final answer is right. I hope it is correct.", "B"),
    (SIDE, "answer: left. The answer is right", "A"),
    (SIDE, "The final answer is left. I hope the final answer is right", "A"),
    (SIDE, "The final answer is: left", "A"),
    (SIDE, "final answer is beside", "B"),  # nothing has to follow the letter here
    (["desk", "cabinet"], "The final answer is cabinet", ""),  # C
    (["desk", "cabinet"], "It is the cabinet", "B"),
    # tags
    (SIDE, "left <answer>B</answer>", "B"),
    (SIDE, "<answer> right </answer>", "B"),
    (SIDE, "<answer>Right</answer>", ""),
    (SIDE, "<answer>\nB\n</answer>", "B"),
    (SIDE, "<answer>so\nB</answer> A", "A"),  # not seen, so all of the response counts
    (SIDE, "<answer>A</answer> <answer>B</answer>", "A"),
    (SIDE, "B <answer></answer>", ""),
    (SIDE, "B <answer>none</answer>", ""),
    (SIDE, "<answer>A", ""),
    (SIDE, "", ""),
    (SIDE, "no answer", ""),
    # LaTeX
    (SIDE, "$B$", "B"),
    (SIDE, "\\(B\\)", "B"),
    (SIDE, "\\boxed{B}", "B"),
    (SIDE, "\\boxed{right}", "B"),
    (SIDE, "\\boxed{\\text{B}}", ""),
    (SIDE, "\\boxed{A} then \\boxed{B}", "B"),
    (SIDE, "\\boxed{A} and \\boxed{B}", ""),
    (SIDE, "$A$ or $B$", ""),
    # numbers, compared as they are written
    (COUNT, "3", "A"),
    (COUNT, "03", "A"),
    (COUNT, "3%", "A"),
    (COUNT, "$3", "A"),
    (COUNT, "3 chairs", "A"),
    (COUNT, "2x", "B"),
    (COUNT, "=2", "B"),
    (COUNT, "there are 2 - ", "B"),
    (COUNT, "There are 2 dogs and 1 cat", "C"),
    (COUNT, "We count 1, 2, 3", "A"),
    (COUNT, "it is 1 + 2 = 3", "A"),
    (COUNT, "1 + 2 = 3", "C"),
    (COUNT, "3 (A)", "A"),
    (COUNT, "1,000", "C"),
    (COUNT, "<answer>C</answer>", "C"),
    (COUNT, "three", ""),
    (COUNT, "-3", ""),
    (COUNT, "there are 3.00", ""),
    (COUNT, "2/1", ""),
    (COUNT, "(3)", ""),
    (COUNT, "10", ""),
    (COUNT, "x2", ""),
    (COUNT, "9^9^9^9", ""),
    (COUNT, "$1 000", ""),
    (COUNT, "\\[1\n2\\]", ""),
    (COUNT, "so 3(2) or", ""),
    (COUNT, "so 3(2) - 3 I", "A"),  # sympy cannot parse that, so the search goes on
    (COUNT, "final answer is: 2 1", "B"),
    (COUNT, "the answer 2 2 = 1", "C"),
    (COUNT, "the answer is 3 = 2 apples", "B"),
    (SIDE, "answer A 1 =", "A"),
    (SIDE, "$Left$", ""),
    (["Left", "Right"], "$Left$", "A"),
    (["1000", "000"], "The final answer is 000", ""),
]


@pytest.mark.parametrize(("options", "response", "letter"), PAPER)
def test_the_papers_rule(options, response, letter):
    right_for = [g for g in range(len(options)) if paper_correct(response, options, g)]
    assert "".join("ABCDEF"[g] for g in right_for) == letter


def test_without_letters_only_texts_count():
    """SAT shows no letters: neither they nor articles are answers."""
    assert not paper_correct("A", SIDE, 0, letters=False)
    assert not paper_correct("$A$", SIDE, 0, letters=False)
    assert paper_correct("it is left, A", ["A chair", "left"], 1, letters=False)
    assert paper_correct("on a shelf to the left", SIDE, 0, letters=False)
    assert paper_correct("left of a dog", SIDE, 0, letters=False)
    assert paper_correct("B", ["B", "A"], 0, letters=False)
    assert not strict_correct("<answer>A</answer>", SIDE, 0, letters=False)
    assert strict_correct("<answer>B</answer>", ["B", "A"], 0, letters=False)


@pytest.mark.parametrize(
    ("options", "response", "letter"),
    [
        *[(SIDE, f"<answer>{a}</answer>", "B") for a in ("B", "b", "(B)", "B.", "**B**", "right", "Right!", "RIGHT")],
        *[(SIDE, f"<answer>{a}</answer>", "B") for a in ("(B) right", "B) right", "B. right", "b: Right", "B right")],
        (SIDE, "<answer>\n  right\n</answer> trailing left", "B"),
        (["on the left", "right"], "<answer>On\nthe  left</answer>", "A"),
        (SIDE, "<answer>A</answer> <answer>B</answer>", "B"),
        (SIDE, "<answer>A <answer>B</answer>", "B"),
        (SIDE, "<answer>A</answer> <answer>B", "A"),
        (SIDE, "B", ""),
        (SIDE, "<answer>B", ""),
        (SIDE, "<answer></answer> B", ""),
        (SIDE, "<answer>.</answer>", ""),
        (SIDE, "<answer>C</answer>", ""),
        (SIDE, "<answer>left or right</answer>", ""),
        (SIDE, "<answer>A, B</answer>", ""),
        (SIDE, "<answer>(A) right</answer>", ""),
        (SIDE, "<answer>on a shelf to the right</answer>", ""),
        (COUNT, "<answer>3</answer>", "A"),
        (COUNT, "<answer>-3</answer>", ""),
        (["3", "-3"], "<answer>-3</answer>", "B"),
        (["3", "-3"], "<answer>(B) -3</answer>", "B"),
        (["3", "-3"], "<answer>(B) 3</answer>", ""),
        (COUNT, "<answer>3.0</answer>", ""),
        (DEPTH, "<answer>A</answer>", "A"),
        (DEPTH, "<answer>B is closer</answer>", "B"),
        (DOOR, "<answer>Door (highlighted by a red box)</answer>", "A"),
        (["b", "a"], "<answer>(B) (a)</answer>", "B"),
        (["?", "yes"], "<answer></answer>", ""),
        (["b", "a"], "<answer>a</answer>", ""),  # letter A and text B: it names two
        (["b", "a"], "<answer>(A) b</answer>", "A"),
    ],
)
def test_the_strict_rule(options, response, letter):
    right_for = [g for g in range(len(options)) if strict_correct(response, options, g)]
    assert "".join("ABCDEF"[g] for g in right_for) == letter


PIECES = ["1-", "1 - ", "(1", "= ", "$a ", "\\boxed{", "\\[ a", "answer ", "<answer>", " [a", "1,", "final answer "]


@pytest.mark.parametrize("piece", PIECES)
def test_no_response_takes_long(piece):
    """A greedy model that repeats itself fills its 1,024 tokens with one piece; backtracking must not explode."""
    response = "answer " + piece * 1024 + "x"
    began = time.perf_counter()
    paper_correct(response, SIDE, 0), strict_correct(response, SIDE, 0)
    assert time.perf_counter() - began < 10


def test_agrees_with_math_verify():
    """The installed library, whose differences from 0.5.2 lie in formulas alone, says the same of the table."""
    math_verify = pytest.importorskip("math_verify")
    letters = [form for x in "ABCDEFabcdef" for form in (x, f"({x})")]
    for options, response, letter in PAPER:
        if "answer>" in response or "^" in response or "then" in response:
            continue  # tags are cut before; powers run for ever; two boxes are one of the differences
        strings = math_verify.StringExtractionConfig(strings=(*letters, *options))
        kinds = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig(), strings]
        found = math_verify.parse(response, kinds, parsing_timeout=None)
        right_for = ""
        for gold, option in zip("ABCDEF", options, strict=False):
            right = {option, option.lower(), gold, gold.lower(), f"({gold})", f"({gold.lower()})"}
            right_for += gold if any(isinstance(text, str) and text in right for text in found) else ""
        assert right_for == letter, (options, response, found)
