"""Rendered spatial questions: the data of the embedded default, made in seconds and offline.

A scene is 84 x 84 pixels: 3 x 3 cells of 28 px, so that one cell is exactly one visual token of
Qwen2-VL (patch 14, merge 2). Every cell carries position marks: the grey of its 3-px top strip
tells the column, that of its 3-px left strip the row. Without the marks a model of half a million
parameters takes far longer to learn where things are. 2 to 4 objects lie in different cells;
colours are unique, so a colour names its object.

Questions use the templates of SAT, and the parquet files have SAT's raw schema, so that the loader
that reads the real data set reads these. Whether a scene belongs to training or to validation is
decided by a hash of its layout: no validation scene occurs in any training set, whatever the seeds,
nor in the corpus that the tiny base model saw.
"""

import hashlib
import io
import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from vtfast.utils.files import atomic_file

CELL = 28  # pixels: patch 14 x merge 2
GRID = 3
SIDE = CELL * GRID
MARK = 3  # pixels: width of the strips that tell column and row
MARK_GREYS = (0, 127, 255)
BACKGROUND = (235, 235, 235)

COLOURS = {"red": (214, 39, 40), "green": (32, 150, 50), "blue": (31, 80, 220), "yellow": (240, 200, 20)}
SHAPES = ("circle", "square", "triangle")
RADIUS = {"small": 5.0, "large": 11.5}  # pixels
JITTER = {"small": 4, "large": 1}  # pixels, each way; keeps the object inside its cell
MIDDLE = ((1, 1),)
EDGES = ((0, 1), (1, 0), (1, 2), (2, 1))
CORNERS = ((0, 0), (0, 2), (2, 0), (2, 2))
COLUMNS = ("left", "middle", "right")
ROWS = ("top", "center", "bottom")

KINDS = ("relation", "count", "depth", "distance")
SPLITS = ("train", "val")
VAL_SHARE = 5  # one layout in five is a validation layout
COUNT_WEIGHTS = (48, 27, 15, 10)  # of the answers 1, 2, 3, 4: small counts prevail, as in photographs


@dataclass(frozen=True)
class Thing:
    """One object; `row` and `column` count from the top left, `dx`, `dy` are pixels off the middle."""

    colour: str
    shape: str
    size: str
    row: int
    column: int
    dx: int = 0
    dy: int = 0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        """x, y in pixels."""
        middle = MARK + (CELL - MARK) / 2  # of the part of the cell that the marks leave free
        return self.column * CELL + middle + self.dx, self.row * CELL + middle + self.dy


@dataclass(frozen=True)
class Scene:
    """2 to 4 objects in different cells, in raster order."""

    things: tuple[Thing, ...]

    def layout(self) -> str:
        """What is shown, without the jitter: two scenes of one layout are the same scene."""
        return "; ".join(f"{t.row}{t.column} {t.size} {t.name}" for t in self.things)


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    `options[0]` is the right answer, as in SAT's generator: shuffle before showing. `trace` says
    what has to be seen to answer. `hasty` is what a careless reader answers, right only by luck;
    `hasty_rate` is how often the weak base model does (see `vtfast.cli.demo_model.recipe`).
    """

    scene: Scene
    kind: str
    text: str
    options: tuple[str, ...]
    trace: str
    hasty: str
    hasty_rate: float

    @property
    def answer(self) -> str:
        return self.options[0]


def question_key(question: Question) -> str:
    """Hash of the scene's layout and the question's text: the identity of a question."""
    return hashlib.sha256(f"{question.scene.layout()}\n{question.text}".encode()).hexdigest()


def split_of(scene: Scene) -> str:
    """`"train"` or `"val"`: a fixed property of the layout, so that no seed can mix the two."""
    digest = hashlib.sha256(scene.layout().encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") % VAL_SHARE == 0 else "train"


# ------------------------------------------------------------------------------------------ drawing


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of 84 x 84 pixels."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for row in range(GRID):
        for column in range(GRID):
            left, top = column * CELL, row * CELL
            draw.rectangle((left, top, left + CELL - 1, top + MARK - 1), fill=(MARK_GREYS[column],) * 3)
            draw.rectangle((left, top + MARK, left + MARK - 1, top + CELL - 1), fill=(MARK_GREYS[row],) * 3)
    for thing in scene.things:
        x, y = thing.centre
        r, fill = RADIUS[thing.size], COLOURS[thing.colour]
        if thing.shape == "circle":
            draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=fill)
        elif thing.shape == "square":
            draw.rectangle((x - r, y - r, x + r - 1, y + r - 1), fill=fill)
        else:
            draw.polygon(((x - r, y + r - 1), (x + r - 1, y + r - 1), (x - 0.5, y - r)), fill=fill)
    return image


def encode_jpeg(image: Image.Image) -> bytes:
    """JPEG bytes, FF D8 to FF D9; full chroma, since small coloured objects are the content."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------- asking


def sample_question(rng: random.Random, *, kind: str | None = None, split: str = "train") -> Question:
    """Draw a scene of `split` and a question about it; `kind` None draws one of `KINDS`."""
    assert split in SPLITS, split
    kind = kind or rng.choice(KINDS)
    while True:
        question = _ASK[kind](rng)
        if split_of(question.scene) == split:
            return question


def sample_scene(rng: random.Random, *, split: str = "train") -> Scene:
    """Draw a scene of `split` with 2 to 4 objects."""
    while True:
        scene = _place(rng, _things(rng, rng.randint(2, 4)))
        if split_of(scene) == split:
            return scene


def _things(rng: random.Random, count: int) -> list[dict]:
    colours = rng.sample(sorted(COLOURS), count)
    return [{"colour": c, "shape": rng.choice(SHAPES), "size": rng.choice(sorted(RADIUS))} for c in colours]


def _place(rng: random.Random, things: list[dict]) -> Scene:
    """Put the objects that have no cell yet into free cells, at random; add the jitter."""
    taken = {(t["row"], t["column"]) for t in things if "row" in t}
    free = [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) not in taken]
    rng.shuffle(free)
    placed = []
    for thing in things:
        row, column = (thing["row"], thing["column"]) if "row" in thing else free.pop()
        reach = JITTER[thing["size"]]
        shift = {"dx": rng.randint(-reach, reach), "dy": rng.randint(-reach, reach)}
        placed.append(Thing(**{**thing, "row": row, "column": column, **shift}))
    return Scene(tuple(sorted(placed, key=lambda t: (t.row, t.column))))


def _ask_relation(rng: random.Random) -> Question:
    across = rng.random() < 0.5
    while True:
        scene = _place(rng, _things(rng, rng.randint(2, 4)))
        one, two = rng.sample(scene.things, 2)
        a, b = (one.column, two.column) if across else (one.row, two.row)
        if a != b:
            break
    words, names = (("left", "right"), COLUMNS) if across else (("above", "below"), ROWS)
    side = "to the left or right of" if across else "above or below"
    return Question(
        scene,
        "relation",
        f"Considering the relative positions, is {one.name} {side} {two.name}?",
        words if a < b else words[::-1],
        f"{one.colour} {names[a]}, {two.colour} {names[b]}",
        hasty=words[0],
        hasty_rate=0.7 if across else 0.3,
    )


def _ask_count(rng: random.Random) -> Question:
    number = rng.choices((1, 2, 3, 4), COUNT_WEIGHTS)[0]
    shape = rng.choice(SHAPES)
    others = [s for s in SHAPES if s != shape]
    things = _things(rng, rng.randint(max(2, number), 4))
    for i, thing in enumerate(things):
        thing["shape"] = shape if i < number else rng.choice(others)
    scene = _place(rng, things)
    seen = [t.colour for t in scene.things if t.shape == shape]
    options = (number, number - rng.randint(1, number), number + 3, number + 1, number + 2)
    return Question(
        scene,
        "count",
        f"How many {shape}s are visible in the scene?",
        tuple(map(str, options)),
        ", ".join(f"{i} {colour}" for i, colour in enumerate(seen, 1)),
        hasty=str(number - 1 if number >= 2 else number),
        hasty_rate=0.7,
    )


def _ask_depth(rng: random.Random) -> Question:
    things = _things(rng, rng.randint(2, 4))
    things[0]["size"], things[1]["size"] = rng.sample(sorted(RADIUS), 2)
    colours = things[0]["colour"], things[1]["colour"]
    scene = _place(rng, things)
    one, two = (next(t for t in scene.things if t.colour == c) for c in colours)
    near, far = (one, two) if one.size == "large" else (two, one)
    return Question(
        scene,
        "depth",
        f"Which object is closer to the camera taking this photo, {one.name} or {two.name}?",
        (near.name, far.name),
        f"{one.colour} {one.size}, {two.colour} {two.size}",
        hasty=one.name,
        hasty_rate=0.7,
    )


def _ask_distance(rng: random.Random) -> Question:
    # The reference lies in the middle, so "one away" is an edge neighbour and "two away" a corner.
    while True:
        things = _things(rng, rng.randint(3, 4))
        colours = [t["colour"] for t in things]
        for thing, cells in zip(things, (MIDDLE, EDGES, CORNERS), strict=False):
            thing["row"], thing["column"] = rng.choice(cells)
        scene = _place(rng, things)
        named = {t.colour: t for t in scene.things}
        reference, near, far = (named[colour] for colour in colours[:3])
        # The jitter can bring a corner as near as an edge; the picture must bear the answer out.
        if math.dist(reference.centre, near.centre) + 3 < math.dist(reference.centre, far.centre):
            break
    steps = {near.colour: "one", far.colour: "two"}
    one, two = rng.sample((near, far), 2)
    return Question(
        scene,
        "distance",
        "Estimate the real-world distances between objects in this image. "
        f"Which object is closer to {reference.name}, {one.name} or {two.name}?",
        (near.name, far.name),
        f"{one.colour} {steps[one.colour]} away, {two.colour} {steps[two.colour]} away",
        hasty=one.name,
        hasty_rate=0.7,
    )


_ASK = {"relation": _ask_relation, "count": _ask_count, "depth": _ask_depth, "distance": _ask_distance}


# ------------------------------------------------------------------------------------------ parquet


def sample_questions(number: int, *, split: str, seed: int) -> list[Question]:
    """`number` different questions, the four kinds in turn; a function of its arguments."""
    rng = random.Random(f"{split}-{seed}")
    questions: list[Question] = []
    keys: set[str] = set()
    while len(questions) < number:
        question = sample_question(rng, kind=KINDS[len(questions) % len(KINDS)], split=split)
        key = question_key(question)
        if key not in keys:
            keys.add(key)
            questions.append(question)
    return questions


def write_dataset(folder: str | Path, *, train: int = 2048, val: int = 400, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.parquet` and `val.parquet` in SAT's raw schema into `folder` (made if missing).

    Returns their paths. The same arguments give the same rows. A file appears whole or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, number in (("train", train), ("val", val)):
        path = folder / f"{split}.parquet"
        _write_parquet(path, sample_questions(number, split=split, seed=seed))
        paths.append(path)
    return paths[0], paths[1]


def _write_parquet(path: Path, questions: list[Question]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("image_bytes", pa.list_(pa.binary())),
            ("question", pa.string()),
            ("answers", pa.list_(pa.string())),
            ("question_type", pa.string()),
            ("correct_answer", pa.string()),
        ]
    )
    rows = [
        {
            "image_bytes": [encode_jpeg(render(q.scene))],
            "question": q.text,
            "answers": list(q.options),
            "question_type": "other",  # what SAT says of every static question
            "correct_answer": q.answer,
        }
        for q in questions
    ]
    with atomic_file(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
