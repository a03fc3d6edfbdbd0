"""The Hugging Face hub: fetches models and data sets at a printed revision, checks their contents and paths, and uploads models."""

from collections.abc import Callable, Sequence
import concurrent.futures
import hashlib
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

# owner/name, then perhaps @ and a branch, a tag or a commit. No part begins with a dot: a revision becomes part of a path.
_ADDRESS = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)
# Files of a model next to its weights that say how it reads texts and samples them.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
_CACHED = re.compile(r"(models|datasets)--.+")  # a repository in the hub's cache


class HubError(ValueError):
    """A file or repository of the hub is missing or damaged; the message is a sentence."""


class Fetched(NamedTuple):
    """Files of a repository on this machine."""

    directory: pathlib.Path  # of this revision in the hub's cache
    files: list[pathlib.Path]  # the requested files, sorted
    revision: str  # their commit


def is_address(text: str) -> bool:
    """Returns whether the text has the form owner/name or owner/name@revision."""
    return _ADDRESS.fullmatch(text) is not None


def name_of(address: str) -> str:
    """Returns owner/name, without the revision."""
    return _parts(address)[0]


def at_revision(address: str, revision: str) -> str:
    """Returns the address of the repository at another revision."""
    return f"{name_of(address)}@{revision}"


def fetch(address: str, wanted: Sequence[str], *, kind: str = "model", ignored: Sequence[str] = ()) -> Fetched:
    """Downloads files of a repository, or finds them in the hub's cache. Prints their commit to stderr.

    `wanted` and `ignored` are patterns of the names of files to fetch, and to leave out; `kind` is "model" or
    "dataset". The hub's client compares sizes after a download. This function also compares contents with the hash in
    the name of the cached file: git's hash for a small file, SHA-256 for a large one. Raises HubError if the repository
    or revision does not exist, the network fails, or a file differs from the hub's.
    """
    import huggingface_hub.utils  # costs a second; needed only for downloads

    name, revision = _parts(address)
    patterns: dict[str, Any] = {"allow_patterns": list(wanted), "ignore_patterns": list(ignored)}
    try:
        found = huggingface_hub.snapshot_download(name, repo_type=kind, revision=revision, **patterns)
    except Exception as e:  # the network, the hub and the disk raise a dozen classes
        reason = str(e).strip().partition("\n")[0]
        raise HubError(f"{address} could not be had from the Hugging Face hub: {type(e).__name__}: {reason}") from e
    directory = pathlib.Path(found)
    there = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    files = [inside(directory, name) for name in huggingface_hub.utils.filter_repo_objects(there, **patterns)]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        list(pool.map(_verify, files))
    commit = directory.name
    hint = "" if revision == commit else f" (write {name}@{commit} to stay with it)"
    print(f"{address}: revision {commit} of the Hugging Face hub{hint}.", file=sys.stderr)
    return Fetched(directory, files, commit)


def cached(name: str, file: str, revision: str) -> pathlib.Path | None:
    """Returns a file of a model in the hub's cache; None if it is not there."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
    return pathlib.Path(found) if isinstance(found, str) else None


class Upload(NamedTuple):
    """A repository of the hub to upload a model to; made by `open_upload`."""

    name: str
    api: Any  # huggingface_hub.HfApi


def check_upload(name: str) -> None:
    """Raises HubError without a token, and for a name that is not owner/name; asks the hub nothing."""
    import huggingface_hub
    import huggingface_hub.utils

    try:
        huggingface_hub.utils.validate_repo_id(name)
        valid = is_address(name) and "@" not in name
    except ValueError:
        valid = False
    if not valid:
        raise HubError(
            f"{name!r} is no name for a model on the hub: write owner/name, in letters, digits, - _ and dots."
        )
    if huggingface_hub.get_token() is None:
        raise HubError(
            f"An upload to {name} needs a token of the Hugging Face hub that may write: run hf auth login, or set HF_TOKEN."
        )


def open_upload(name: str, *, private: bool) -> Upload:
    """Makes a repository for a model, if there is none of this name; an existing one stays private or public.

    Raises HubError if the hub refuses it, and what `check_upload` raises.
    """
    import huggingface_hub

    check_upload(name)
    api = huggingface_hub.HfApi()
    _ask(name, lambda: api.create_repo(name, private=private, exist_ok=True, repo_type="model"))
    return Upload(name, api)


def upload(to: Upload, directory: pathlib.Path, message: str) -> str:
    """Uploads the files of a directory, and returns the address of the model. Raises HubError.

    Files of an earlier upload that are not in the directory are removed: weights in another number of files, adapters or
    files of another tokenizer would otherwise be read next to the new ones. Other files of the repository stay.
    """
    old = ["*.safetensors", "*.index.json", "adapter_config.json", "config.json", *TOKENIZER_FILES]
    send = lambda: to.api.upload_folder(
        repo_id=to.name, folder_path=directory, commit_message=message, delete_patterns=old
    )
    _ask(to.name, send)
    return f"https://huggingface.co/{to.name}"


def _ask(name: str, request: Callable[[], Any]) -> None:
    try:
        request()
    except Exception as e:  # the network and the hub raise a dozen classes
        reason = str(e).strip().partition("\n")[0].rstrip(".")
        raise HubError(f"{name} could not be written on the Hugging Face hub: {type(e).__name__}: {reason}.") from e


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Returns `directory/name`, existing or not. Raises HubError if it leads out, except to the hub cache's blobs."""
    path = directory / name
    try:
        home, found = directory.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as e:  # a circle of links, or an impossible name
        raise HubError(f"{path} cannot be followed: {e}.") from e
    homes = [home]
    if home.parent.name == "snapshots" and _CACHED.fullmatch(home.parents[1].name):
        homes += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    if not any(found.is_relative_to(place) for place in homes):
        raise HubError(f"{path} leads to {found}, outside of {directory}; put the file itself there.")
    return path


def _parts(address: str) -> tuple[str, str | None]:
    """Returns owner/name and the revision."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise HubError(f"{address!r} is not a repository of the hub: write owner/name or owner/name@revision.")
    return match[1], match[2]


def _verify(path: pathlib.Path) -> None:
    """Raises HubError if a cached file does not have the hash in its name: SHA-256, or SHA-1 as git computes it."""
    expected = pathlib.PurePath(os.readlink(path)).name if path.is_symlink() else ""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected):  # unknown on a file system without links
        return
    digest = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        hashlib.file_digest(file, lambda: digest)
    if digest.hexdigest() != expected:
        fault = f"its hash is {digest.hexdigest()}, not {expected}. Delete {path.resolve()} and try again"
        raise HubError(f"{path} is not what the hub has under this name: {fault}.")
