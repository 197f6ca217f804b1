"""Models on a hub that speaks the protocol of Hugging Face: download with a cache, and upload. HF_ENDPOINT names another hub."""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lumos import registry
from lumos.data.trained_on import TrainedOn
from lumos.errors import NotFound, RunError, UserError, meant, reason_of
from lumos.files import write_bytes
from lumos.shipped import shipped_path

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
FILES = ["*.json", "*.safetensors", "*.model", "*.jit", "*.md", "*.txt"]
"""The files of a model folder; others of a repository are not downloaded."""
DOWNLOAD = ("token", "cache_dir", "local_files_only", "force_download")
"""The arguments of `local_folder` that `from_pretrained` passes on."""
T = TypeVar("T")


def is_repository(folder: str | Path) -> bool:
    """Return whether this may be the name of a repository, ORG/NAME: it is no folder here, and ORG is none either."""
    text = str(folder)
    return bool(REPOSITORY.fullmatch(text)) and not Path(text).exists() and not Path(text).parent.exists()


def local_folder(
    folder: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return a folder unchanged, or the folder in the user's cache with the files of the repository ORG/NAME.

    The path of a shipped model in the repository of Lumos, such as checkpoints/lumos-tiny, is that model from any working folder.
    Files that are in the cache are not downloaded again; without a connection the cached ones are used. NotFound if the hub has no
    such repository, RunError if it cannot be reached and the cache has no such model.

    token: default the one of `hf auth login`. cache_dir: default the cache of huggingface_hub. local_files_only: ask no hub.
    force_download: download files that are in the cache too.
    """
    if shipped := shipped_path(folder):
        return shipped
    if not is_repository(folder):
        return Path(folder)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(
            str(folder), revision=revision, allow_patterns=FILES, endpoint=endpoint(), etag_timeout=10, token=token,
            cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download,
        ))  # fmt: skip
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = f"{folder} at the revision {revision}" if isinstance(error, errors.RevisionNotFoundError) else folder
        advice = "check the name, or log in if it is private"
        raise NotFound(f"there is no model folder {folder}, and no {what} on {hub()}; {advice}") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        if local_files_only:
            raise NotFound(
                f"there is no model folder {folder}, and it is not in the cache; leave local_files_only out to download it"
            ) from error
        raise RunError(
            f"there is no model folder {folder}, and {hub()} could not be reached ({reason_of(error)}); download it once with a "
            "connection, or give a folder"
        ) from error


def model_folder(
    pipeline: type, folder: str | Path, revision: str | None, download: Mapping[str, Any], generator: str | None = None
) -> Path:
    """Return the `local_folder` of a model for the `from_pretrained` of a class of pipelines.

    TypeError if `download` has other names than local_folder takes; UserError if the folder holds a model of another generator.
    """
    if unknown := [name for name in download if name not in DOWNLOAD]:
        taken = dict.fromkeys((*inspect.signature(pipeline.from_pretrained).parameters, *DOWNLOAD))
        names = [name for name in taken if name not in ("download", "options")]
        near = meant(unknown[0], names) or ";"
        raise TypeError(f"unexpected argument {unknown[0]!r}{near} {pipeline.__name__}.from_pretrained takes {', '.join(names)}")
    place = local_folder(folder, revision, **download)
    if generator is not None and (place / "config.json").is_file():
        found = registry.generator_of(place)
        if found.name != generator:
            raise UserError(f"{place} holds a model of the generator {found.name}; load it with VideoPipeline.from_pretrained")
    return place


def upload(
    repository: str,
    save: Callable[[Path], None],
    card: Callable[[str], str],
    *,
    private: bool | None,
    message: str,
    token: str | None,
) -> str:
    """Create a repository if there is none, upload what `save` writes into a folder, and return the address of the commit.

    card: returns the text of README.md, for the whole name of the repository, if `save` writes none. RunError if the hub refuses.
    """
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi(endpoint=endpoint(), token=token)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save(folder)
        try:
            name = api.create_repo(repository, private=private, exist_ok=True).repo_id
            if not (folder / "README.md").exists():
                write_bytes(folder / "README.md", card(name).encode())
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            raise RunError(f"{hub()} did not take {repository} ({reason_of(error)}); check the name and the token") from error


def model_card(name: str, generator: str, trained_on: TrainedOn | None) -> str:
    """Return a short card of a model for its repository."""
    lists = "".join(f"| {key} | {', '.join(values)} |\n" for key, values in (trained_on.lists if trained_on else {}).items())
    known = f"\n## What it was trained on\n\n| list | entries |\n| --- | --- |\n{lists}" if lists else ""
    head = f"---\nlibrary_name: lumos\npipeline_tag: text-to-video\ntags: [text-to-video, {generator}]\n---\n"
    code = f'from lumos import VideoPipeline\n\npipe = VideoPipeline.from_pretrained("{name}")\n'
    return f"{head}\n# {name.rpartition('/')[2]}\n\n```python\n{code}```\n{known}"


def endpoint() -> str | None:
    """Return the address of the hub in HF_ENDPOINT; None: the usual one."""
    return os.environ.get("HF_ENDPOINT") or None


def hub() -> str:
    return endpoint() or "the Hugging Face hub"
