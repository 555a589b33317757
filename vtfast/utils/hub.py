"""Models and data sets of the Hugging Face hub, with quick and clear errors.

The hub's own clients retry for half a minute and more without a connection. One plain request first fails at once;
without a connection, what an earlier run downloaded is used.
"""

import re
from pathlib import Path
from typing import BinaryIO, Literal

from vtfast.utils.did_you_mean import closest, did_you_mean
from vtfast.utils.errors import UserError
from vtfast.utils.files import expand, step_of
from vtfast.utils.text import first_line

Kind = Literal["dataset", "model"]

ASSETS = Path(__file__).parents[1] / "model" / "assets"
"""Checkpoints that ship with vtfast, each in a folder of its name."""
EXAMPLE_MODEL = "Qwen/Qwen2-VL-2B"
DATASETS = (
    "array/SAT",
    "array/SAT-v2",
    "leonardPKU/clevr_cogen_a_train",
    "leonardPKU/GEOQA_R1V_Train_8K",
    "lmms-lab/multimodal-open-r1-8k-verified",
)
"""Ids of the sets whose columns are recognised (`vtfast.data.columns`)."""


def is_hub_id(source: str) -> bool:
    """Whether `source` looks like `owner/name` and not like the path of a file."""
    is_file = source.endswith((".parquet", ".json", ".jsonl", ".csv", ".arrow"))
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)) and not is_file


def hub_files(repo: str, kind: Kind) -> tuple[list[str], str] | Path:
    """The names of a repository's files and their commit; without a connection, the folder of its downloaded copy.
    Raises UserError if there is neither; its message names the id and how to use a local copy."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = HfApi().repo_info(repo, repo_type=kind, timeout=10)
        return [file.rfilename for file in info.siblings or []], info.sha
    except Exception as error:  # the client's own, its http library's, the socket's
        if isinstance(error, GatedRepoError):
            reason = "access has to be asked for on its page, then log in with `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "no such id, or a private one"
        else:
            reason = f"no connection ({type(error).__name__}: {first_line(error)})"
            try:
                return Path(snapshot_download(repo, repo_type=kind, local_files_only=True))
            except Exception:
                reason += ", and no downloaded copy"
        local = "a folder with its data files" if kind == "dataset" else "a checkpoint folder"
        neighbours = [str(path) for path in Path(repo).parent.glob("*")]
        meant = closest(repo, neighbours + list(DATASETS if kind == "dataset" else ()))
        hint = f" (did you mean {meant}?)" if meant else ""
        raise UserError(
            f"{repo} is no local path{hint}, and the Hugging Face hub does not give this {kind}: "
            f"{reason}. To use a local copy, give the path of {local} instead, made on a connected "
            f"machine with `hf download {repo} --repo-type {kind} --local-dir FOLDER`"
        ) from error


def model_path(path: str | Path) -> str:
    """A checkpoint's folder, or a hub id that exists, for `from_pretrained`. A bare name may be that of a checkpoint
    that ships with vtfast. Raises UserError for anything else."""
    folder = expand(path)
    if folder.is_dir():
        checkpoints = sorted(folder.glob("checkpoints/step-*"), key=lambda checkpoint: step_of(checkpoint.name) or 0)
        if checkpoints and not (folder / "config.json").is_file():
            what = f"it is a run folder; give one of its checkpoints, such as {checkpoints[-1]}"
            raise UserError(f"no model folder {folder}: {what}")
        return str(folder)
    if Path(path).name == str(path) and (ASSETS / path).is_dir():
        return str(ASSETS / path)
    if not is_hub_id(str(path)):
        wanted = f"give a checkpoint folder or a hub id such as {EXAMPLE_MODEL}"
        known = [shipped.name for shipped in ASSETS.iterdir()]
        hint = f"it is a file; {wanted}" if folder.exists() else did_you_mean(path, wanted, known)
        raise UserError(f"no model folder {path}; {hint}")
    copy = hub_files(str(path), "model")
    return str(copy) if isinstance(copy, Path) else str(path)


def open_dataset_file(repo: str, name: str, commit: str, *, download: bool) -> str | BinaryIO:
    """A file of a data set: the path of its downloaded copy, or a file object that streams it. `download`: fetch the
    whole file into the cache, instead of only the parts that are read."""
    from huggingface_hub import HfFileSystem, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, name, repo_type="dataset", revision=commit)
    if isinstance(cached, str):
        return cached
    if download:
        return hf_hub_download(repo, name, repo_type="dataset", revision=commit)
    return HfFileSystem().open(f"datasets/{repo}@{commit}/{name}", "rb")
