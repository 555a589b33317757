"""VisualThinker's rewards, decision by decision: what `src/open_r1/grpo.py` of VisualThinker-R1-Zero pays for.

accuracy  1. math-verify reads the whole completion, thinking included, and `<answer>GOLD</answer>` as the solution; its
             arguments are swapped: the completion stands in for the gold. The anchors that math-verify wants around a
             number are not there in `<answer>3</answer>`, so for a gold that is one word or one number (all of SAT's
             static questions) this step never pays. It can pay where the gold has white space before a number
             (`turned by 30 degrees`) or is LaTeX (`$3$`, `\\frac{3}{4}`): for the completion's rightmost match.
          2. Otherwise the inside of the *first* `<answer>…</answer>` that lies on one line, or without one the whole
             completion, both stripped, must equal the gold letter for letter,
          3. or the last of A to H that stands alone in it must. Without any, the original raises and catches an
             IndexError: no reward.
format    `<think>…</think>`, white space, `<answer>…</answer>` from the first character to the last: not even a line
          feed may follow. What is inside does not matter, further tags included.
length    shared with the strict mode. The original tokenized the text again; here the sampled tokens are counted, the
          end token among them.

Not bit for bit: the original ran math-verify 0.5.2, and 0.9 runs here. On 16,000 completions made up of 70 fragments,
for 66 golds, words and counts as in SAT among them, both decide alike but in three cases: `0,750` was 750 and is 0.75;
`$\\pm 3$` as a gold was equal to `3`; `$a = b = 3$` was cut to `3` and is now the equation `a = 3`. What else differs
between the two (lists with `, and`, units, percentages, inequalities) can only matter for a gold that is LaTeX itself.
The original's time limits, three seconds for each expression, were machine time too. Steps 2 and 3 cannot differ.
"""

import logging
import re
import threading
from typing import TYPE_CHECKING

from vtfast.rewards.reward import zero_on_error

if TYPE_CHECKING:
    from vtfast.data import Sample

PREFIX = "<think>"
"""What the study's prompt for a base model ends with."""
SECONDS = 3
"""math-verify's own limit for one text or comparison, the original's. It needs the main thread."""
_SHAPE = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>")
_LETTER = re.compile(r"(?:^|\s|\[|\()([A-H])(?:\s|\]|\)|$)")
_MATHEMATICAL = re.compile(r"[\d$\\[]")


@zero_on_error
def accuracy_reward(completion: str, sample: "Sample", *, prefix: str = PREFIX) -> float:
    """1.0 or 0.0, by the three steps above.

    Args:
        prefix: what the prompt had already written of the response; it is no part of what the original reads, whether
            `completion` starts with it or leaves it out.
    """
    content = completion.removeprefix(prefix)
    solution = f"<answer>{sample.answer}</answer>"
    if may_use_math_verify(sample) and _verify(content, solution):
        return 1.0
    gold, student = _first_answer(solution), _first_answer(content)
    return float(student == gold or _LETTER.findall(student)[-1:] == [gold])


@zero_on_error
def format_reward(completion: str, sample: "Sample", *, prefix: str = PREFIX) -> float:
    """1.0 if the response, `prefix` included, is thinking and answer to the last character, else 0.0."""
    response = prefix + completion.removeprefix(prefix)
    return float(_SHAPE.fullmatch(response) is not None)


def may_use_math_verify(sample: "Sample") -> bool:
    """Whether math-verify can find anything in the gold: all its patterns want one of these characters."""
    return _MATHEMATICAL.search(sample.answer) is not None


def _first_answer(text: str) -> str:
    match = _ANSWER.search(text)
    return (match[1] if match else text).strip()


def _verify(content: str, solution: str) -> bool:
    from math_verify import parse, verify  # brings sympy

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    target = parse(solution, parsing_timeout=seconds)
    if not target:  # nothing is equal to nothing; most golds end here
        return False
    return bool(verify(parse(content, parsing_timeout=seconds), target, timeout_seconds=seconds))
