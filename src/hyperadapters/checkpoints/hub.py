"""Checkpoints on the Hugging Face Hub: a repository holds the files of a checkpoint and its card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hyperadapters._version import __version__
from hyperadapters.checkpoints.card import CARD_FILE, is_generated, read_scores, write_card
from hyperadapters.checkpoints.format import CONFIG_FILE, TOKENIZER_PATTERN, WEIGHTS_PATTERN, is_checkpoint, save_model
from hyperadapters.errors import CheckpointError, HyperAdaptersError, OutputError
from hyperadapters.heads.unfitted import warn_of_unfitted_heads
from hyperadapters.model.model import HyperAdapterModel

_LOG_IN = "log in with `hf auth login`, or pass token="
_REASONS: dict[type[Exception], str] = {
    HFValidationError: "the name is none that the Hub could have, which is like user/name",
    OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, and it is not in the cache; unset it, or fetch it once without it",
    GatedRepoError: f"its owner gives access on request: ask on its page, then {_LOG_IN}",
    RepositoryNotFoundError: f"there is none of this name, or it is private: check the name; if it is, {_LOG_IN}",
    RevisionNotFoundError: "it has no such revision: check the name of the branch or tag, or make it first",
}
"""What is said of an error; the first one that it is an instance of, or was caused by."""


def find_checkpoint(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a checkpoint: the folder of this name, or else the Hub's files of this name in its cache.

    The cache is read without the Hub where that cannot be reached, or with HF_HUB_OFFLINE=1.

    Args:
        name: Of a folder, or a string like "user/name".
        revision: Branch, tag or commit on the Hub.
        token: For the Hub; default: that of `hf auth login`.

    Raises:
        CheckpointError: If there is no such folder, and no such checkpoint on the Hub or no way to get it; or a revision
            of a folder is asked for.
    """
    folder = Path(name)
    if isinstance(name, Path) or os.path.lexists(folder):
        if revision is not None:
            raise CheckpointError(
                f"{name}: revision '{revision}' is for names on the Hub; this is a folder, which has none: omit it"
            )
        return folder
    with _explained(f"{name}: no such folder, and on the Hub", CheckpointError):
        if name.count("/") != 1:
            raise HFValidationError
        found = snapshot_download(
            name,
            revision=revision,
            token=token,
            allow_patterns=[CONFIG_FILE, WEIGHTS_PATTERN, f"{TOKENIZER_PATTERN}/*"],
            library_name="hyperadapters",
            library_version=__version__,
        )
    if not is_checkpoint(Path(found)):
        raise CheckpointError(f"{name}: no such folder, and on the Hub no checkpoint: expected a file {CONFIG_FILE}")
    return Path(found)


def push(
    model: HyperAdapterModel,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a checkpoint; see `HyperAdapterModel.push_to_hub`, which names arguments and errors."""
    api = HfApi(token=token, library_name="hyperadapters", library_version=__version__)
    with TemporaryDirectory() as temporary, _explained(f"{repo_id}: not uploaded to the Hub", OutputError):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        info = api.model_info(repo_id, revision=revision)
        present = {file.rfilename for file in info.siblings or ()}
        cards = [] if model.folder is None else [model.folder / CARD_FILE]
        if CARD_FILE in present:
            cards.append(Path(api.hf_hub_download(repo_id, CARD_FILE, revision=info.sha, cache_dir=temporary)))
        folder = Path(temporary, "checkpoint")
        warn_of_unfitted_heads(model.heads, model.tasks)
        save_model(model, folder)
        if cards := [path for path in cards if path.is_file()]:
            # one that somebody wrote or changed, here or there, goes before one that the library wrote
            shutil.copyfile(min(cards, key=is_generated), folder / CARD_FILE)
        write_card(model, folder, repo_id, license, None if model.folder is None else read_scores(model.folder))
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in files.items()),
                *(CommitOperationDelete(name) for name in sorted(present - files.keys()) if _is_part(name)),
            ],
            commit_message=commit_message or "Upload a checkpoint of hyperadapters",
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,  # what somebody else pushed meanwhile is not mixed with it
        )
    return str(commit.commit_url)


def _is_part(name: str) -> bool:
    """Whether a file in a repository is the weights or of the tokenizer of a checkpoint."""
    folder, _, file = name.rpartition("/")
    return fnmatch(folder, TOKENIZER_PATTERN) if folder else fnmatch(file, WEIGHTS_PATTERN)


@contextmanager
def _explained(what: str, error_class: type[HyperAdaptersError]) -> Iterator[None]:
    """Turn whatever goes wrong with the Hub into one error of the library."""
    try:
        yield
    except (OSError, ValueError, HTTPError) as error:
        known = (_REASONS[kind] for kind in _REASONS if isinstance(error, kind) or isinstance(error.__cause__, kind))
        raise error_class(f"{what}: {next(known, ' '.join(str(error).split()))}") from error
