"""The images of Visual Spatial Reasoning, which its data set only names: found on disk or, on request, downloaded."""

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
"""Seconds without a response from the server."""
THREADS = 8
MAX_BYTES = 50_000_000


def cache_folder() -> Path:
    """Where downloaded images are kept, unless `--image_folder` names a folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vtfast" / "vsr"


def locate(examples: Sequence[Example], image_folder: Path | None) -> list[Example]:
    """The same examples with the paths of existing files.

    Looks in `image_folder`, beside the data file, in `images/` there, and in the cache of downloads.

    Raises:
        UserError: some are missing; the message names the first and what to do.
    """
    paths = [_find(example, image_folder) for example in examples]
    missing = [example for example, path in zip(examples, paths, strict=True) if path is None]
    if missing:
        candidates = _candidates(missing[0], image_folder)
        raise UserError(
            f"vsr: {len(missing)} of {len(examples)} images are missing, {candidates[0].name} first (looked in "
            f"{', '.join(str(path.parent) for path in candidates)}). --image_folder FOLDER says where they are;"
            " --fetch_images fetches them from COCO's links"
        )
    return [dataclasses.replace(example, images=(path,)) for example, path in zip(examples, paths, strict=True) if path]


def fetch(examples: Sequence[Example], image_folder: Path | None) -> None:
    """Download the images that `locate` would miss into `image_folder` or the cache.

    Raises:
        UserError: an image could not be downloaded; the others are kept, and another call continues.
    """
    folder = image_folder or cache_folder()
    urls = {
        _candidates(example, folder)[0]: example.image_url
        for example in examples
        if _find(example, image_folder) is None
    }
    if not urls:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(THREADS) as pool:
        results = tqdm(pool.map(_fetch_one, urls, urls.values()), total=len(urls), desc="images", unit="image")
        failures = [failure for failure in results if failure]
    if failures:
        raise UserError(
            f"vsr: {len(failures)} of {len(urls)} images could not be fetched into {folder}: {failures[0]}. "
            "Call again to go on, or put the files there"
        )


def _fetch_one(path: Path, url: str) -> str | None:
    """The problem, or None."""
    if not url.startswith(("http://", "https://")):
        return f"{path.name}: no link"
    for attempt in itertools.count(1):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                data = response.read(MAX_BYTES)
            check_image(data)
            break
        except (OSError, ImageError, ValueError) as error:  # OSError: HTTP errors, sockets, time-outs
            if attempt == TRIES:
                return f"{url}: {error}"
        time.sleep(PAUSE * 2 ** (attempt - 1))
    with atomic_file(path) as file:
        file.write(data)
    return None


def _find(example: Example, image_folder: Path | None) -> Path | None:
    return next((path for path in _candidates(example, image_folder) if path.is_file()), None)


def _candidates(example: Example, image_folder: Path | None) -> list[Path]:
    (path,) = example.images
    assert isinstance(path, Path), "VSR's rows name their image"
    folders = [image_folder, path.parent, path.parent / "images", cache_folder()]
    return [folder / path.name for folder in folders if folder is not None]
