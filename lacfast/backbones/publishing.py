"""Uploads a saved model to the hub, when it is told to."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from lacfast.backbones.storage import EXACT_WEIGHTS
from lacfast.checkpoint import TRAINER_STATE
from lacfast.runtime.directories import MANIFEST, require_whole


def push_to_hub(
    directory: str | Path,
    repository: str,
    *,
    private: bool | None = True,
    token: str | None = None,
    commit_message: str = "",
    branch: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a saved model with its card, and without what only training needs; returns the commit's URL.

    Args:
        directory: that trainer.save, save_backbone or a run wrote: a checkpoint, or checkpoints/best.
        repository: "owner/name", which is made if it is not there. The account is that of `hf auth login`.
        private: of a repository that is made. None: as the hub has it by default.
        token: of another account.
        commit_message: empty: the directory's name.
        branch: that is written. None: the main one.
        create_pr: propose the commit instead.

    Raises:
        ValueError: when no model lies in `directory`; DamagedError where it is not as it was written.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).exists():
        raise ValueError(
            f"{directory} holds no saved model; pass a checkpoint, as runs/cats/checkpoints/best, or a "
            "directory that trainer.save() wrote"
        )
    require_whole(directory)
    hub = HfApi(token=token)
    name = hub.create_repo(repository, private=private, exist_ok=True).repo_id
    # The manifest has a checksum of every file, and these stay here.
    done = hub.upload_folder(
        repo_id=name,
        folder_path=directory,
        ignore_patterns=[TRAINER_STATE, MANIFEST, EXACT_WEIGHTS],
        commit_message=commit_message or f"Upload {directory.name} by lacfast",
        revision=branch,
        create_pr=create_pr,
    )
    return str(done.commit_url)
