"""Which column of a data set holds what: by name where a flag says so, else by the names that published sets use.

| set | question | answer | options | images |
|---|---|---|---|---|
| `array/SAT` | question | correct_answer | answers | image_bytes |
| `array/SAT-v2` | question | correct_answer | answers | images |
| R1-V's `clevr_cogen_a_train`, `GEOQA_R1V_Train_8K` | problem | solution: `<answer> 3 </answer>` | | image |
| `multimodal-open-r1-8k-verified` | problem | solution: `<think>…</think> … <answer>B</answer>` | | image |
| Geo170K as R1-Multimodal-Journey converts it | problem | solution, as above | | image |
| Geo170K before that | question | answer: `… Answer: B` | | image: a path |
| MATH | problem | answer (its `solution` is the derivation) | | |

Certain: the columns of each, from its card or from the code that reads or writes it. Assumed: that the rows of
`multimodal-open-r1-8k-verified` all keep to the form that its authors' script writes; one that does not is read as its
whole text. The columns `original_question` and `original_answer` of that set are not read.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

from vtfast.utils.errors import UserError

# In order of preference; a set with both `answer` and `solution` has the bare answer in the first.
SATS_ANSWER = "correct_answer"
QUESTION = ("question", "problem")
ANSWER = (SATS_ANSWER, "answer", "solution")
OPTIONS = ("options", "choices")
IMAGE = ("image_bytes", "images", "image")
QUESTION_TYPE = "question_type"
MESSAGES = "messages"


@dataclass(frozen=True)
class Columns:
    """Names of columns. None: not said, or behind `resolve` not there."""

    question: str | None = None
    answer: str | None = None
    options: str | None = None
    image: str | None = None

    def resolve(self, there: Collection[str]) -> "Columns":
        """These columns with the unsaid ones recognised among the names `there`.

        A row may lack its options or image column, even one that was said: it asks an open or a text-only question.
        `check` tells whether a whole file lacks it.

        Raises:
            UserError: no column for the question or for the answer.
        """
        question = self.question or _first(QUESTION, there)
        answer = self.answer or _first(ANSWER, there)
        lacking = [
            f"{name} (--{name}_column)"
            for name, column in (("question", question), ("answer", answer))
            if column not in there
        ]
        if lacking:
            raise UserError(
                f"columns {', '.join(sorted(map(str, there))) or 'none'}, and none of them is the "
                f"{' or the '.join(lacking)}. Known names: {', '.join(QUESTION)}; "
                f"{', '.join(ANSWER)}; or messages"
            )
        # `answers` are options in SAT alone; elsewhere they are several people's answers.
        options = self.options or _first(("answers", *OPTIONS) if answer == SATS_ANSWER else OPTIONS, there)
        return Columns(question, answer, options, self.image or _first(IMAGE, there))

    def check(self, there: Collection[str], where: str) -> None:
        """Raises UserError, naming `where`, if a column that was said is not there or none fits."""
        if MESSAGES in there and self == AUTO_COLUMNS:
            return
        for entry in fields(self):
            column = getattr(self, entry.name)
            if column is not None and column not in there:
                raise UserError(
                    f"{where}: no column {column!r}, which --{entry.name}_column names (there is: "
                    f"{', '.join(sorted(map(str, there))) or 'nothing'})"
                )
        try:
            self.resolve(there)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def wanted(self, there: Collection[str]) -> list[str]:
        """The names among `there` that reading a row needs."""
        if MESSAGES in there and self == AUTO_COLUMNS:
            found = [MESSAGES, "images"]
        else:
            resolved = self.resolve(there)
            found = [getattr(resolved, entry.name) for entry in fields(resolved)] + [QUESTION_TYPE]
        return [name for name in dict.fromkeys(found) if name in there]


AUTO_COLUMNS = Columns()
"""None said: all recognised by their names."""


def is_sat(said: Columns, found: Columns) -> bool:
    """Whether columns were recognised as SAT's, where a row without options or without images is a broken one."""
    return said.answer is None and found.answer == SATS_ANSWER


def keys(rows: Collection[object]) -> set[str]:
    """All names in a batch of rows of a JSON file, where a row may leave out what it has not got."""
    return {key for row in rows if isinstance(row, Mapping) for key in row}


def _first(names: Collection[str], there: Collection[str]) -> str | None:
    return next((name for name in names if name in there), None)
