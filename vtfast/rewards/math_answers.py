"""Open answers that are numbers, quantities or formulas: `3/4`, `\\frac{3}{4}`, `12 cm`, `x^2 + 1`.

The whole answer must be the number, quantity or formula: `3 or 4` and `the answer is 3` do not equal `3`. math-verify
compares the two. This file checks the text first, because sympy would compute 9^9^9, and no time limit would stop it.
"""

import logging
import math
import re
import threading
from typing import Any

MATH_WORDS = {
    *("frac", "dfrac", "tfrac", "sqrt", "pi", "times", "cdot", "div", "pm", "infty", "theta"),
    *("alpha", "beta", "sin", "cos", "tan", "log", "ln", "le", "leq", "ge", "geq", "cup", "in"),
}
"""LaTeX commands that are understood. A gold with another one is compared as text."""
UNITS = {
    name: unit
    for unit, names in {
        "mm": "mm millimeter millimetre",
        "cm": "cm centimeter centimetre",
        "m": "m meter metre",
        "km": "km kilometer kilometre",
        "inch": "in inch inche",
        "foot": "ft foot feet",
        "degree": "degree deg °",
        "g": "g gram",
        "kg": "kg kilogram",
        "s": "s sec second",
        "min": "min minute",
        "h": "h hr hour",
        "l": "l liter litre",
    }.items()
    for name in names.split()
}
AMBIGUOUS_WORDS = re.compile(
    r"\b(?:or|and|not|no|to|than|least|most|between|about|around|maybe|either|neither|more|less"
    r"|fewer|over|under)\b"
)
"""Words that make an answer ambiguous: it names several numbers, or not an exact one."""
LONGEST = 200
LARGEST_POWER = 300
SECONDS = 5
"""math-verify's time limit for one text or comparison."""

_WRAPPED = re.compile(r"\\boxed\{(?P<box>.*)\}|\\\((?P<round>.*)\\\)|\\\[(?P<square>.*)\\\]|\$+(?P<dollar>[^$]+)\$+")
_AROUND = " .,;:!?*_`\"'“”‘’"
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|~|\\left\b|\\right\b|\\displaystyle\b")
_UPRIGHT = re.compile(r"\\(?:text|mathrm|mbox|textrm)\s*\{([^{}]*)\}")
_REWRITES = [  # keyboard forms -> LaTeX
    (re.compile("[−–]"), "-"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"[*×·]"), r"\\cdot "),
    (re.compile("÷"), "/"),
    (re.compile(r"\^\s*(-?\d+)"), r"^{\1}"),
    (re.compile(r"(?<!\\)\bpi\b|π"), r"\\pi "),
    (re.compile(r"√\s*(\d+)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<!\\)\bsqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"²"), "^2"),
    (re.compile(r"³"), "^3"),
    (re.compile(r"(?<![\d.])(\d+) +(\d+)/(\d+)(?![\d.])"), r"(\1+\2/\3)"),  # mixed numbers
    # math-verify takes a number and a bracket side by side for a mixed number: 3(4) would be 7
    (re.compile(r"(?<![\d_^.])(\d+(?:\.\d+)?)\s*\("), r"\1\\cdot("),
    (re.compile(r"\)\s*\("), r")\\cdot("),
]
_UNIT = re.compile(
    r"(?<=[\d)}.])(?P<gap>\s*)(?P<unit>°|\^\s*\{?\s*\\circ\s*\}?|[A-Za-z][A-Za-z/ ]*?)(?P<power> *\^ *\{?[23]\}?)?\s*$"
)
_CURRENCY = re.compile(r"^\\?[$€£¥]\s*(?=[\d.])")
_NAMED = re.compile(r"[A-Za-z](?:_\w|_\{\w+\})?\s*=(?=[^=]+$)")
_POWER = re.compile(r"\^\s*(\{[^{}^]*\}|\w)")
_LITTERED = re.compile(r"\d\s+\d|\d_|\^\s*$|\\\\|[#&@!~\"'?;$]")


def is_math(text: str) -> bool:
    """Whether a gold is to be compared as mathematics: it has a digit or a LaTeX command and no words but a unit."""
    return _normalize_math(text) is not None


def math_equal(answer: str, gold: str) -> bool:
    """Whether `answer` is the number, quantity or formula `gold`, however written.

    A unit may be missing on either side; where both have one they must agree. `x = 3` is `3`, other equations are only
    equal to equations.
    """
    wanted, given = _normalize_math(gold), _normalize_math(answer)
    if wanted is None or given is None:
        return False
    if "".join(_unwrapped(answer).split()) == "".join(_unwrapped(gold).split()):
        return True
    (gold_formula, gold_unit), (formula, unit) = wanted, given
    if gold_unit and unit and gold_unit != unit:
        return False
    if "=" not in gold_formula:
        formula = _NAMED.sub("", formula, count=1)
        if "=" in formula:
            return False
    return _equal(formula, gold_formula)


def _normalize_math(text: str) -> tuple[str, str] | None:
    """Returns (LaTeX without wrapping and unit, the unit or ""), or None if the text is not mathematics that sympy can
    safely compute."""
    text = " ".join(text.split())
    if len(text) > LONGEST:
        return None
    text = _unwrapped(text)
    text = _UPRIGHT.sub(r" \1 ", _SPACING.sub(" ", text)).strip(" ")
    text = re.sub(r"\s*\bper ?cent\b", "%", text)
    text = _CURRENCY.sub("", text)
    for pattern, latex in _REWRITES:
        text = pattern.sub(latex, text)
    text, unit = _split_unit(text)
    words = re.findall(r"(\\?)([A-Za-z]+)", text)
    if any(word not in MATH_WORDS for slash, word in words if slash):
        return None
    if any(len(word) > 2 for slash, word in words if not slash):
        return None
    if not (re.search(r"\d", text) or any(slash for slash, _ in words)):
        return None
    if _LITTERED.search(text) or not _small_powers(text):
        return None
    return text, unit


def _unwrapped(text: str) -> str:
    """Strips what surrounds an answer: bold, quotes, a full stop, dollars, a box."""
    while True:
        bare = text.strip(" ").lstrip(_AROUND.replace(".", "")).rstrip(_AROUND)
        match = _WRAPPED.fullmatch(bare)
        if match is None:
            return bare
        text = next(inside for inside in match.groups() if inside is not None)


def _split_unit(text: str) -> tuple[str, str]:
    """`12 cm` -> ("12", "cm"). A unit is a known one, or words of three letters or more. A one-letter unit
    needs a space before it."""
    match = _UNIT.search(text)
    if match is None:
        return text, ""
    name = "degree" if "circ" in match["unit"] or match["unit"] == "°" else match["unit"].casefold()
    words = re.split("[ /]+", name)
    known = [UNITS.get(word) or UNITS.get(word.removesuffix("s")) for word in words]
    apart = bool(match["gap"])
    for word, unit in zip(words, known, strict=True):
        spelled = apart and len(word) > 2 and word not in MATH_WORDS
        if AMBIGUOUS_WORDS.fullmatch(word) or not (spelled or (unit and (apart or len(word) > 1))):
            return text, ""
    power = re.sub(r"\D", "", match["power"] or "")
    unit = "/".join(unit or word.removesuffix("s") for word, unit in zip(words, known, strict=True))
    return text[: match.start()].rstrip(), unit + power


def _small_powers(text: str) -> bool:
    """Whether all exponents are simple, and small even if they multiply."""
    exponents = _POWER.findall(text)
    numbers = [int(number) for exponent in exponents for number in re.findall(r"\d+", exponent)]
    return len(exponents) == text.count("^") and math.prod(numbers) <= LARGEST_POWER


def _equal(formula: str, gold: str) -> bool:
    from latex2sympy2_extended import NormalizationConfig  # both bring sympy
    from math_verify import LatexExtractionConfig

    # Units are split off above: here they would be stripped from products of variables too (2ab).
    spelling = NormalizationConfig(True, units=False, malformed_operators=True, nits=True)
    config = [LatexExtractionConfig(normalization_config=spelling)]
    return math_verify(f"${gold}$", f"${formula}$", SECONDS, extraction_config=config, fallback_mode="no_fallback")


def math_verify(gold: str, answer: str, seconds: int | None, **parse_options: Any) -> bool:
    """The judgement of the library math-verify.

    `seconds`: its time limit for one text or comparison. It works by signals, so in the main thread only."""
    from math_verify import parse, verify  # brings sympy, and most answers never get here

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    if threading.current_thread() is not threading.main_thread():
        seconds = None
    target = parse(answer, parsing_timeout=seconds, **parse_options)
    if not target:  # then `verify` returns False
        return False
    return bool(verify(parse(gold, parsing_timeout=seconds, **parse_options), target, timeout_seconds=seconds))
