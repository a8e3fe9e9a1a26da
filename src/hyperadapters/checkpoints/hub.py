"""Checkpoints on the Hugging Face Hub. A repository contains the files of a checkpoint and its model card."""

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
    HFValidationError: "this is no valid name of a repository, which has the form user/name",
    OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, and the repository is not in the cache; unset it and retry",
    GatedRepoError: f"the owner gives access on request: request it on the page of the repository, then {_LOG_IN}",
    RepositoryNotFoundError: f"there is no repository of this name, or it is private: check the name, or {_LOG_IN}",
    RevisionNotFoundError: "there is no such revision: check the name of the branch or tag, or create it",
}
"""Explanations of errors. The first class that an error, or its cause, is an instance of applies."""


def find_checkpoint(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Find a checkpoint. If there is no folder of its name, it is downloaded from the Hub into the cache.

    If the Hub cannot be reached, or the environment variable HF_HUB_OFFLINE is 1, files in the cache are used.

    Args:
        name: A folder, or a name on the Hub such as "user/name".
        revision: Branch, tag or commit on the Hub. Default: the main branch.
        token: Token for the Hub. Default: the token of `hf auth login`.

    Returns:
        The folder that contains the checkpoint.

    Raises:
        CheckpointError: If there is no such folder and no such checkpoint on the Hub, the checkpoint cannot be
            downloaded, or `name` is a folder and a revision is given.
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
    """Upload a checkpoint and its model card to the Hugging Face Hub, in one commit that replaces the previous one.

    The card contains the scores of the file `metrics.json` in the `folder` of the model. A README.md that was written
    or edited by hand takes precedence over the generated one: first the one in `folder`, then the one on the Hub.

    Args:
        model: Model to upload.
        repo_id: Name on the Hub, such as "user/name". The repository is created if it does not exist.
        private: Whether a new repository is private. Default: the setting of the owner's account.
        token: Token for the Hub. Default: the token of `hf auth login`.
        license: License for the card by its name on the Hub, such as "apache-2.0". Default: the license of the card
            that is replaced.
        commit_message: Message of the commit. Default: "Upload a checkpoint of hyperadapters".
        revision: Branch to commit to. Default: the main branch.
        create_pr: Whether to open a pull request with the commit. Default: False.

    Returns:
        URL of the commit.

    Raises:
        OutputError: If the Hub cannot be reached or rejects the commit.
    """
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
            # A card that was written or edited by hand takes precedence over a generated one.
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
            parent_commit=info.sha,  # fails if somebody else has pushed a commit in the meantime
        )
    return str(commit.commit_url)


def _is_part(name: str) -> bool:
    """Return whether a file of a repository belongs to the weights or the tokenizer of a checkpoint."""
    folder, _, file = name.rpartition("/")
    return fnmatch(folder, TOKENIZER_PATTERN) if folder else fnmatch(file, WEIGHTS_PATTERN)


@contextmanager
def _explained(what: str, error_class: type[HyperAdaptersError]) -> Iterator[None]:
    """Convert errors of the Hub to an error of this library."""
    try:
        yield
    except (OSError, ValueError, HTTPError) as error:
        known = (_REASONS[kind] for kind in _REASONS if isinstance(error, kind) or isinstance(error.__cause__, kind))
        raise error_class(f"{what}: {next(known, ' '.join(str(error).split()))}") from error
