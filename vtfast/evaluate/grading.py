"""Decides whether a response is right: by the paper's rule, and by a strict one.

The paper's rule is that of VisualThinker's evaluation scripts. They pass the text in the first `<answer>` (without one,
the whole response) to math-verify 0.5.2, configured with the letters A to F and the option texts, and compare the
result with the right option's letter and text. math-verify turns numbers and LaTeX into sympy objects. A sympy object
never equals a string, so only the text of the chosen match can make a response right. This file finds that text without
sympy. The decision therefore depends on no library's version, and a response such as `9^9^9^9` cannot stall a run.

The rule keeps these quirks because the published numbers include them: without tags, the article in "I see a dog"
answers A; `Left` does not match `left`; `A)` matches nothing; numbers are compared as written, so "about 3.00" does not
match `3`; an option at the start of the response wins over later ones, unless the word "answer" precedes one of those.

On 80,000 random responses made of options, letters, numbers, formulas and these quirks, 6 decisions differed from
math-verify 0.5.2; each of the 6 held broken formulas, or several in a row.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Sequence

from vtfast.evaluate.benchmark import LETTERS, Benchmark, Example, Grade
from vtfast.rewards.strict import AROUND


def grade(benchmark: Benchmark, example: Example, response: str) -> Grade:
    """The grade of one response by both rules."""
    question = example.options, example.gold, benchmark.has_lettered_options
    return Grade(example.task, example.source, paper_correct(response, *question), strict_correct(response, *question))


# ------------------------------------------------------------------------------- the paper's rule

_FIRST_ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>")  # no DOTALL: one line or none
_FINAL, _HOPE = r"(?i:final answer is):?\s*", r"\.?\s?I hope"
_FINAL_IS = r"(?i:final answer.{0,100}?)\s+is:?"

# A number follows the start of the text, white space or "=". A term is numbers joined by signs. Neither
# may start inside a word.
_BEFORE = r"(?:^|\s|=)(?:\*\*)?"
_SIGN = r"[+\-*×/^()÷]"
_OF_TERM = r"[\d.\s+\-*×/^()÷]"
_TERM = rf"{_BEFORE}(?P<term>-?\(?-?\d{_OF_TERM}*{_SIGN}{_OF_TERM}+)(?:\*\*)?(?:[.,:\s)$]|$)"
_DIGITS = r"-?\d{1,3}(?:[ ,]\d{3})+(?:\.\d+)?|-?\d+[.,]\d+|\.\d+|-?\d+"
_NUMBER = rf"{_BEFORE}[$€£¥]?(?P<number>{_DIGITS})(?:\s*(?:%|[Pp]ercent(?:age)?|[Pp]ct))?"
_NUMERIC = f"(?:{_TERM}|{_NUMBER})"
_FORMULA = (
    r"(?:\$\$(?!\$).+?\$\$|(?<![\\\d])\$[^\n$]+\$|\\\[.+?\\\]|\\\([^\n]+?\\\)|\s\[[^\n\]\[]+\]\s"
    r"|-?\\frac\{-?\d+(?:[.,]\d+)?\}\{-?\d+(?:[.,]\d+)?\})"
)
_LATEX = rf"(?P<latex>{_FORMULA}(?:\s*(?:and|or|,)\s*{_FORMULA})*)"
_BOXES = r"(?P<latex>\\boxed\{.+\})"
_BOX = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_LIST = re.compile(r"\s*(?:and|or|,)\s*")
_MARKS = re.compile(r"^(?:\s\[|\\\[|\\\(|\$\$?)|(?:\]\s|\\\]|\\\)|\$\$?)$")


def paper_correct(response: str, options: Sequence[str], gold: int, letters: bool = True) -> bool:
    """Whether the paper's rule calls a response right.

    Args:
        options: texts in the order of their letters.
        gold: index of the right one.
        letters: whether options were shown with letters; where they were not, only their texts count.
    """
    tagged = _FIRST_ANSWER.search(response)
    texts = _math_verify_answer(tagged[1] if tagged else response, tuple(options), letters)
    right = {options[gold], options[gold].lower()}
    if letters:
        letter = LETTERS[gold]
        right |= {letter, letter.lower(), f"({letter})", f"({letter.lower()})"}
    return any(text.strip() in right for text in texts if text.strip())


def _math_verify_answer(text: str, options: tuple[str, ...], letters: bool) -> set[str]:
    """What math-verify takes for the answer: the last match of the highest priority, as written and as parsed."""
    texts: list[str] = []
    for patterns in _patterns_by_priority(options, letters):
        matches = [match for pattern in patterns for match in pattern.finditer(text)]
        matches.sort(key=lambda match: (match.end(), -match.start()), reverse=True)
        for match in matches:
            if match.lastgroup == "option":
                return {*texts[:1], match["option"].lower()}
            texts.append(_latex(match["latex"]) if match.lastgroup == "latex" else _numeric(match))
            if match.lastgroup != "term" or _is_arithmetic(match["term"]):
                return set(texts[:1])
    return set(texts[:1])


@functools.lru_cache(maxsize=256)
def _patterns_by_priority(options: tuple[str, ...], letters: bool) -> list[list[re.Pattern[str]]]:
    """Patterns, the highest priority first: "final answer is", "answer:", "answer", the first word, anywhere."""
    cases = [*LETTERS, *LETTERS.lower()] if letters else []
    names = [*cases, *(f"({letter})" for letter in cases), *options]
    option = f"(?P<option>{'|'.join(map(re.escape, names))})"
    whole = rf"{option}(?:\*\*)?(?:[.,:\s]|$)"
    alone = rf"(?:^|\s)(?:\*\*)?{whole}"
    number = rf"(?:.{{0,100}}=\s*|.{{0,50}}?){_NUMERIC}(?!\s*=)"
    priorities = [
        [_FINAL + _LATEX + _HOPE, _FINAL + _NUMERIC + _HOPE, _FINAL + option + _HOPE],
        [rf"{_FINAL_IS}\s*{_LATEX}", _BOXES, _FINAL_IS + _NUMERIC, rf"{_FINAL_IS}\s*{option}"],
    ]
    for word in ("(?i:answer):", "(?i:answer)"):
        priorities.append([f"{word}.{{0,50}}?{_LATEX}", word + number, f"{word}.{{0,50}}?{alone}"])
    priorities += [[rf"^(?:\*\*)?{whole}"], [_LATEX, _TERM, _NUMBER, alone]]
    # Formulas may run over lines, words may not.
    return [[re.compile(p, re.DOTALL if "<latex>" in p else 0) for p in patterns] for patterns in priorities]


def _numeric(match: re.Match[str]) -> str:
    """A number without leading zeros and thousands' separators; a term as it is."""
    if match.lastgroup == "term":
        return match["term"]
    parts = re.fullmatch(r"(.*?)(?:([.,])(\d+))?", match["number"])
    assert parts is not None
    whole, point, decimals = parts.groups("")
    if point == "," and len(decimals) == 3 and len(whole.lstrip("-")) <= 3:
        whole, point, decimals = whole + decimals, "", ""
    whole = re.sub("[ ,]", "", whole).lstrip("0") or "0"
    return f"{whole}.{decimals}" if point else whole


def _is_arithmetic(term: str) -> bool:
    """Whether sympy could parse it: `2 - 3`, but not `3 - ` or `2 - 3 4`. A term that it cannot parse does not end the
    search."""
    try:
        tree = ast.parse(term.strip().replace("\n", " ").replace("^", "**"), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return not any(isinstance(node, ast.Call | ast.Tuple) for node in ast.walk(tree))


def _latex(text: str) -> str:
    """A formula without its delimiters; the last of several boxes, unless they are one list."""
    boxes = list(_BOX.finditer(text))
    if len(boxes) > 1 and _LIST.fullmatch(text[boxes[-2].end() : boxes[-1].start()]):
        return text
    return boxes[-1][1].strip() if boxes else _MARKS.sub("", text).strip()


# ------------------------------------------------------------------------------- the strict rule

_ANSWERS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_LETTER_FIRST = re.compile(r"([a-f])(?:[^\w+-]+|$)(.*)")


def strict_correct(response: str, options: Sequence[str], gold: int, letters: bool = True) -> bool:
    """Whether the last `<answer>…</answer>` names the right option and no other.

    An option is named by its letter, its text, or both (`B`, `right`, `(B) right`). Case, white space and punctuation
    around it do not count, an answer may span lines, and text outside the tags is ignored.
    """
    answers = _ANSWERS.findall(response)
    answer = _plain(answers[-1]) if answers else ""
    return bool(answer) and _named(answer, [_plain(option) for option in options], letters) == {gold}


def _named(answer: str, options: Sequence[str], letters: bool) -> set[int]:
    named = {index for index, option in enumerate(options) if option == answer}
    match = _LETTER_FIRST.fullmatch(answer) if letters else None
    if match:
        index, rest = LETTERS.lower().index(match[1]), match[2]
        if index < len(options) and rest in ("", options[index]):
            named.add(index)
    return named


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().strip(AROUND)
