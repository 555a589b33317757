"""VisualThinker's rewards: the same decisions as `src/open_r1/grpo.py` of VisualThinker-R1-Zero makes.

accuracy  1. math-verify reads the whole completion, thinking included, and `<answer>GOLD</answer>` as the solution. The
             original swaps the arguments: it passes the completion as the gold. math-verify finds a number only between
             certain characters, which `<answer>3</answer>` lacks. So this step never gives a reward if the gold is one
             word or one number (all of SAT's static questions). It can give one if the gold has white space before a
             number (`turned by 30 degrees`) or is LaTeX (`$3$`, `\\frac{3}{4}`): math-verify then compares the
             completion's rightmost match.
          2. Otherwise the original reads the inside of the *first* `<answer>…</answer>` on one line, or without one the
             whole completion. Stripped, it must equal the stripped gold letter for letter,
          3. or the last single letter A to H in it must equal the gold. Without such a letter, the original raises and
             catches an IndexError, and gives no reward.
format    `<think>…</think>`, white space, `<answer>…</answer>` from the first character to the last; not even a line
          feed may follow. The contents do not matter and may hold further tags.
length    the same as in strict mode. The original tokenized the text again; this code counts the sampled tokens,
          including the end token.

Step 1 can differ from the original, which ran math-verify 0.5.2; this code runs 0.9. On 16,000 completions made
up of 70 fragments, for 66 golds that include words and counts as in SAT, they disagree in three cases. 0.5.2 reads
`0,750` as 750, 0.9 reads 0.75. 0.5.2 takes the gold `$\\pm 3$` for equal to `3`. 0.5.2 cuts `$a = b = 3$` to `3`, 0.9
reads the equation `a = 3`. Other differences (lists with `, and`, units, percentages, inequalities) can only matter
for a gold in LaTeX. The original's time limits of three seconds for each expression also depended on the machine.
Steps 2 and 3 cannot differ.
"""

import re

from vtfast.data import Sample
from vtfast.rewards.math_answers import math_verify
from vtfast.rewards.reward import zero_on_error

PREFIX = "<think>"
"""The end of the study's prompt for a base model."""
SECONDS = 3
"""math-verify's time limit for one text or comparison, as in the original."""
_SHAPE = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>")
_LETTER = re.compile(r"(?:^|\s|\[|\()([A-H])(?:\s|\]|\)|$)")
_MATHEMATICAL = re.compile(r"[\d$\\[]")


@zero_on_error
def accuracy_reward(completion: str, sample: Sample, *, prefix: str = PREFIX) -> float:
    """1.0 or 0.0, by the three steps above.

    Args:
        prefix: the start of the response that the prompt had already written. The original does not read it.
            `completion` may start with it or leave it out.
    """
    content = completion.removeprefix(prefix)
    solution = f"<answer>{sample.answer}</answer>"
    if may_use_math_verify(sample) and math_verify(content, solution, SECONDS):
        return 1.0
    gold, student = _first_answer(solution), _first_answer(content)
    return float(student == gold or _LETTER.findall(student)[-1:] == [gold])


@zero_on_error
def format_reward(completion: str, sample: Sample, *, prefix: str = PREFIX) -> float:
    """1.0 if the response, `prefix` included, is thinking and answer to the last character, else 0.0."""
    response = prefix + completion.removeprefix(prefix)
    return float(_SHAPE.fullmatch(response) is not None)


def may_use_math_verify(sample: Sample) -> bool:
    """Whether math-verify can find anything in the gold: each of its patterns needs one of these characters."""
    return _MATHEMATICAL.search(sample.answer) is not None


def _first_answer(text: str) -> str:
    match = _ANSWER.search(text)
    return (match[1] if match else text).strip()
