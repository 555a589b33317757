"""Which columns of a data set hold question, answer, options and images: from flags, or by the names of published sets.

| set | question | answer | options | images |
|---|---|---|---|---|
| `array/SAT` | question | correct_answer | answers | image_bytes |
| `array/SAT-v2` | question | correct_answer | answers | images |
| R1-V's `clevr_cogen_a_train`, `GEOQA_R1V_Train_8K` | problem | solution: `<answer> 3 </answer>` | | image |
| `multimodal-open-r1-8k-verified` | problem | solution: `<think>…</think> … <answer>B</answer>` | | image |
| Geo170K as R1-Multimodal-Journey converts it | problem | solution, as above | | image |
| Geo170K before that | question | answer: `… Answer: B` | | image: a path |
| MATH | problem | answer (its `solution` is the derivation) | | |

The columns are those of each set's card, or of the code that reads or writes it. The rows of
`multimodal-open-r1-8k-verified` are assumed to have the form that its authors' script writes; the answer of any other
row is its whole text. The columns `original_question` and `original_answer` of that set are not read.
"""

from collections.abc import Collection
from dataclasses import dataclass

from vtfast.utils.errors import UserError

# In order of preference; a set with both `answer` and `solution` has the bare answer in the first.
SATS_ANSWER = "correct_answer"
QUESTION = ("question", "problem")
ANSWER = (SATS_ANSWER, "answer", "solution")
OPTIONS = ("options", "choices")
IMAGE = ("image_bytes", "images", "image")
QUESTION_TYPE = "question_type"
MESSAGES = "messages"


class InvalidRow(UserError):
    """A row that cannot be used; the message says why."""


@dataclass(frozen=True)
class Columns:
    """Names of columns. None: found by name, or, in the result of `resolve`, absent."""

    question: str | None = None
    answer: str | None = None
    options: str | None = None
    image: str | None = None

    def resolve(self, names: Collection[str]) -> "Columns":
        """These columns, with None replaced by the known names among `names`.

        A row may lack its options or image column, even a given one: it is an open or a text-only question. `select`
        refuses a whole file that lacks it.

        Raises:
            InvalidRow: no column for the question or for the answer.
        """
        question = self.question or _first(QUESTION, names)
        answer = self.answer or _first(ANSWER, names)
        missing = [
            f"{name} (--{name}_column)"
            for name, column in (("question", question), ("answer", answer))
            if column not in names
        ]
        if missing:
            raise InvalidRow(
                f"columns {', '.join(sorted(map(str, names))) or 'none'}, and none of them is the "
                f"{' or the '.join(missing)}. Known names: {', '.join(QUESTION)}; "
                f"{', '.join(ANSWER)}; or messages"
            )
        # `answers` are options in SAT alone; elsewhere they are several people's answers.
        options = self.options or _first(("answers", *OPTIONS) if answer == SATS_ANSWER else OPTIONS, names)
        return Columns(question, answer, options, self.image or _first(IMAGE, names))

    def select(self, names: Collection[str]) -> list[str]:
        """The columns among a file's `names` that parsing its rows needs.

        Raises UserError if a given column is not among them, or a needed one is not found."""
        if MESSAGES in names and self == AUTO_COLUMNS:
            needed = [MESSAGES, "images"]
        else:
            for name, column in vars(self).items():
                if column is not None and column not in names:
                    raise UserError(
                        f"no column {column!r}, which --{name}_column names (there is: "
                        f"{', '.join(sorted(map(str, names))) or 'nothing'})"
                    )
            needed = [*vars(self.resolve(names)).values(), QUESTION_TYPE]
        return [name for name in dict.fromkeys(needed) if name in names]


AUTO_COLUMNS = Columns()
"""All columns are found by name."""


def is_sat(given: Columns, resolved: Columns) -> bool:
    """Whether the columns were recognised as SAT's, where a row without options or images is invalid."""
    return given.answer is None and resolved.answer == SATS_ANSWER


def _first(candidates: Collection[str], names: Collection[str]) -> str | None:
    return next((name for name in candidates if name in names), None)
