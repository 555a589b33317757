"""Open questions in strict mode: numbers, quantities and formulas by what they are worth, the rest as text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtfast.data import Sample
from vtfast.rewards import accuracy_reward
from vtfast.rewards.math_answers import is_math, math_equal


def judged(answer: str, gold: str) -> float:
    return accuracy_reward(f"so.</think> <answer>{answer}</answer>", Sample("?", [], gold, []))


RIGHT = [
    ("3", ["3", " 3\n", "3.", "3.0", "+3", "6/2", "**3**", "$3$", "$$3$$", r"\(3\)", r"\[3\]", r"\boxed{3}"]),
    ("3", ["3 chairs", "x = 3", r"n_{1} = 3", r"2 \times 1.5", "2*1.5", "$3", "3 dollars", r"3^\circ", "‘3’"]),
    ("-3", ["-3", "−3", "-6/2"]),
    ("0.5", [".5", "1/2", "0.50", "50%", r"50\%", "50 percent"]),
    ("1.5", ["1 1/2", r"1\frac{1}{2}", "3/2"]),
    ("1000", ["1,000", "1000.0", "10^3", "10^{3}", "10^03", r"10 \times 100", "10**3"]),
    (r"\frac{3}{4}", ["3/4", "0.75", r"\dfrac{3}{4}", r"\frac34", r"$\frac{6}{8}$", "3÷4"]),
    ("1/3", ["0.333333", r"\frac{1}{3}"]),
    (r"2\sqrt{3}", [r"\sqrt{12}", "2*sqrt(3)", "2√3", r"2 \sqrt 3"]),
    (r"2\pi", ["2π", "2 pi", "6.283185"]),
    ("12 cm", ["12 cm", "12cm", "12", "12.0 cm.", r"12 \text{ cm}", r"12\,\mathrm{cm}", "12 centimeters", "12 CM"]),
    ("12", ["12 cm", "12 square units"]),
    ("12 cm^2", ["12 cm²", "12", r"12 \text{cm}^2"]),
    ("12 m", ["12m"]),
    ("5 m/s", ["5 m/s", "5 meters/second", "5"]),
    (r"30^\circ", ["30°", "30 degrees", "30", r"30^{\circ}"]),
    ("3 chairs", ["3", "3 chair"]),
    ("x^2 + 1", ["1 + x^2", "x**2+1", "x²+1"]),
    ("2(x+1)", ["2x + 2", "2*(x+1)"]),
    ("x = 3", ["3", "x=3"]),
    ("y = 2x + 1", ["y = 1 + 2x", "2x + 1"]),
    ("x < 3", ["3 > x"]),
    ("(3, 4)", ["(3,4)", "( 3 , 4 )"]),
    ("2ab", ["2ba"]),
    ("12", ["3(4)", "(3)(4)"]),
    ("10^12", ["1000000000000", "10^{12}"]),
    ("10^-3", ["0.001", "10^{-3}"]),
]
WRONG = [
    ("3", ["4", "-3", ".3", "33", "", "left", "x", "three", "3x", "3 4", "3, 4", "3 or 4", r"3 \text{ or } 4", "3;3"]),
    ("3", ["3 to 4", "at least 3", "not 3", "3 or more", "the answer is 3", "5 = 3", "2 + 1 = 3", "x = 4 = 3"]),
    ("3", ["3 < 5", r"3 \neq 4", r"\pm 3", "3$ or $4", "3_4", r"\text{3 or 4}", r"\unknown{3}", "3 no", "3 maybe"]),
    ("2", ["2x", "2m", "x2", "x < 2"]),
    ("7", ["3(4)", "(3)(4)", "3 4"]),
    ("12 cm", ["12 m", "12 cm^2", "12 chairs", "12 mm", "0.12 m", "13"]),
    (r"30^\circ", ["30 cm", "31°"]),
    (r"\frac{3}{4}", ["3", "4/3", "-3/4", "0.7"]),
    ("[0, 1)", ["(0, 1]", "[0, 1]"]),
    ("(3, 4)", ["(4, 3)", "3"]),
    ("x = 3", ["y = 3", "x = 4", "x"]),
    ("x + 1", ["x", "x - 1", "1"]),
    ("5 m/s", ["5 m", "5 km/h"]),
]


@pytest.mark.parametrize(("gold", "answer"), [(gold, answer) for gold, answers in RIGHT for answer in answers])
def test_the_same_however_written(gold, answer):
    assert judged(answer, gold) == 1.0


@pytest.mark.parametrize(("gold", "answer"), [(gold, answer) for gold, answers in WRONG for answer in answers])
def test_something_else(gold, answer):
    assert judged(answer, gold) == 0.0


def test_only_the_last_answer_is_read():
    sample = Sample("?", [], r"\frac{3}{4}", [])
    assert accuracy_reward("0.75</think><answer>1</answer>", sample) == 0.0
    assert accuracy_reward("0.75", sample) == 0.0
    assert accuracy_reward("<answer>1</answer><answer>0.75</answer>", sample) == 1.0


@pytest.mark.parametrize("gold", ["left", "on", "A", "AB", "room 12", "the red one", "", "x", r"\triangle ABC"])
def test_words_are_text(gold):
    """As a product of letters, `on` would be equal to `no`."""
    assert not is_math(gold)
    assert not math_equal(gold, gold)
    assert judged(f" {gold.upper()}.\n", gold) == 1.0 or not gold
    assert judged(gold[::-1] + "?", gold) == 0.0 or len(gold) < 2


HARMFUL = [
    *("9^{9^{9^{9}}}", "9^9^9^9", "9**9**9**9", "((9^{99})^{99})^{99}", r"9^{99\cdot99\cdot99}", "9^(99*99*99)"),
    *("1+99999999!+1", r"\Gamma(99999999)", "0+" * 2000 + "3", "3." + "0" * 5000, r"\sum_{i=1}^{99999999}i"),
    *(r"\binom{99999999}{999}", "10^-999999999", r"\sqrt[3]{9^9^9^9}", "{" * 100, "(" * 199),
]


@pytest.mark.parametrize("answer", HARMFUL)
def test_nothing_that_sympy_would_compute_for_days_reaches_it(answer):
    assert not is_math(answer)
    assert judged(answer, "3") == judged(answer, "x^2 + 1") == 0.0


PIECES = [
    *("3", "12", "4.5", "x", "ab", " ", "cm", "or", "chairs", "+", "-", "*", "/", "^", "_", "=", "<"),
    *("(", ")", "[", "]", "{", "}", ",", ".", "%", "$", "°", "²", "√", "π", "\\frac", "\\sqrt", "\\text{"),
    *("\\boxed{", "\\pi", "\\circ", "\\left(", "\\right)", "\\\\", "\\,", "|", "\n", "\x00", "½", "٣"),
]
MESS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@settings(max_examples=200, deadline=5000)
@given(MESS, st.sampled_from(["3", r"\frac{3}{4}", "12 cm", "x^2 + 1", "[0, 1)", "50%"]))
def test_no_answer_raises(answer, gold):
    assert judged(answer, gold) in (0.0, 1.0)


@settings(max_examples=100, deadline=5000)
@given(MESS)
def test_every_expression_is_the_same_as_itself(text):
    assert math_equal(text, text) == is_math(text)
