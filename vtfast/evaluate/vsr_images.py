"""The images of Visual Spatial Reasoning, which its data set only names: found on disk or, if asked for, fetched."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from vtfast.data.images import ImageError, check_image
from vtfast.evaluate.benchmark import Example
from vtfast.utils.errors import UserError
from vtfast.utils.files import atomic_file

TRIES = 4
PAUSE = 1.0
"""Seconds before the second try; doubled before each further one."""
TIMEOUT = 30.0
"""Seconds without an answer from the server."""
AT_ONCE = 8
MOST_BYTES = 50_000_000


def cache_folder() -> Path:
    """Where fetched images are kept, unless `--image_folder` names a place."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vtfast" / "vsr"


def locate(examples: Sequence[Example], image_folder: Path | None) -> list[Example]:
    """The same examples with paths of files that exist.

    An image is looked for in `image_folder`, beside the data file, in `images/` there, and among the fetched ones.

    Raises:
        UserError: some are nowhere; the message names the first and what to do.
    """
    found = [_find(example, image_folder) for example in examples]
    missing = [example for example, path in zip(examples, found, strict=True) if path is None]
    if missing:
        looked = ", ".join(str(path.parent) for path in _places(missing[0], image_folder))
        raise UserError(
            f"vsr: {len(missing)} of {len(examples)} images are missing, {missing[0].images[0].name} first (looked in "
            f"{looked}). --image_folder FOLDER says where they are; --fetch_images fetches them from COCO's links"
        )
    return [dataclasses.replace(example, images=(path,)) for example, path in zip(examples, found, strict=True)]


def fetch(examples: Sequence[Example], image_folder: Path | None) -> None:
    """Fetch what `locate` would miss into `image_folder` or the cache.

    Raises:
        UserError: an image that cannot be had, named; what came is kept, and another call goes on from there.
    """
    folder = image_folder or cache_folder()
    missing = {example.images[0].name: example.link for example in examples if _find(example, image_folder) is None}
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    with ThreadPoolExecutor(AT_ONCE) as pool, tqdm(total=len(missing), desc="images", unit="image") as bar:
        for failure in pool.map(_fetch_one, missing, missing.values(), itertools.repeat(folder)):
            bar.update()
            failures += [failure] if failure else []
    if failures:
        raise UserError(
            f"vsr: {len(failures)} of {len(missing)} images could not be fetched into {folder}: {failures[0]}. "
            "Call again to go on, or put the files there"
        )


def _fetch_one(name: str, link: str, folder: Path) -> str | None:
    """What went wrong, if anything did."""
    if not link.startswith(("http://", "https://")):
        return f"{name}: no link"
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(link, timeout=TIMEOUT) as answer:
                data = answer.read(MOST_BYTES)
            check_image(data)
        except (OSError, ImageError, ValueError) as error:  # OSError: HTTP errors, sockets, time-outs
            problem = f"{link}: {error}"
            continue
        with atomic_file(folder / name) as file:
            file.write(data)
        return None
    return problem


def _find(example: Example, image_folder: Path | None) -> Path | None:
    return next((path for path in _places(example, image_folder) if path.is_file()), None)


def _places(example: Example, image_folder: Path | None) -> list[Path]:
    given = example.images[0]
    folders = [image_folder, given.parent, given.parent / "images", cache_folder()]
    return [folder / given.name for folder in folders if folder is not None]
