"""The Hugging Face hub: models and data sets fetched at a revision that is named and checked; and no file from outside its directory."""

from collections.abc import Sequence
import concurrent.futures
import hashlib
import os
import pathlib
import re
import sys
from typing import NamedTuple

# owner/name, and behind an @ a branch, a tag or a commit. No part begins with a dot: a revision becomes part of a path.
_ADDRESS = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)
_CACHED = re.compile(r"(models|datasets)--.+")  # a repository in the hub's cache


class HubError(ValueError):
    """What could not be had from the hub; the message is a sentence."""


class Fetched(NamedTuple):
    """Files of a repository on this machine.

    Attributes:
      directory: where they lie.
      files: those that were asked for, sorted.
      revision: the commit they are of.
    """

    directory: pathlib.Path
    files: list[pathlib.Path]
    revision: str


def is_address(text: str) -> bool:
    """Whether this could be owner/name or owner/name@revision."""
    return _ADDRESS.fullmatch(text) is not None


def name_of(address: str) -> str:
    """owner/name, without a revision."""
    return _ADDRESS.fullmatch(address)[1]


def at_revision(address: str, revision: str) -> str:
    """The same repository at this revision."""
    return f"{name_of(address)}@{revision}"


def fetch(address: str, wanted: Sequence[str], *, kind: str = "model", ignored: Sequence[str] = ()) -> Fetched:
    """Files of a repository, downloaded or found in the hub's cache; the commit they are of goes to stderr.

    The hub's client compares sizes when it downloads. Here contents are compared too, with the hashes that the cache keeps them under:
    git's of a small file, SHA-256 of a large one.

    Args:
      address: owner/name, or owner/name@revision.
      wanted, ignored: patterns of names.
      kind: "model" or "dataset".

    Raises:
      HubError: there is no such repository or revision, the network fails, or a file is not what the hub calls by this name.
    """
    import huggingface_hub.utils  # only where something is downloaded

    name, revision = _ADDRESS.fullmatch(address).groups()
    try:
        directory = pathlib.Path(
            huggingface_hub.snapshot_download(
                name, repo_type=kind, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(ignored)
            )
        )
    except Exception as e:  # of the network, of the hub and of the disk: a dozen classes
        reason = str(e).strip().partition("\n")[0]
        raise HubError(f"{address} could not be had from the Hugging Face hub: {type(e).__name__}: {reason}") from e
    there = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    names = huggingface_hub.utils.filter_repo_objects(there, allow_patterns=list(wanted), ignore_patterns=list(ignored))
    files = [inside(directory, name) for name in names]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        list(pool.map(_verify, files))
    commit = directory.name
    hint = "" if revision == commit else f" (write {name}@{commit} to stay with it)"
    print(f"{address}: revision {commit} of the Hugging Face hub{hint}.", file=sys.stderr)
    return Fetched(directory, files, commit)


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """The path `directory/name`, whether or not there is such a file.

    Raises:
      HubError: by its name or as a link it is somewhere outside. Links of the hub's cache may point to the contents it keeps.
    """
    path = directory / name
    try:
        home, found = directory.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as e:  # a circle of links, a name that none can have
        raise HubError(f"{path} cannot be followed: {e}.") from e
    homes = [home]
    if home.parent.name == "snapshots" and _CACHED.fullmatch(home.parents[1].name):
        homes += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    if not any(found.is_relative_to(place) for place in homes):
        raise HubError(f"{path} leads to {found}, outside of {directory}; put the file itself there.")
    return path


def _verify(path: pathlib.Path) -> None:
    """Refuses a file of the cache that does not have the hash it is kept under."""
    # On a file system without links no hash is known.
    kept = pathlib.PurePath(os.readlink(path)).name if path.is_symlink() else ""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", kept):
        return
    digest = hashlib.sha256() if len(kept) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)  # as git does
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != kept:
        raise HubError(
            f"{path} is not what the hub has under this name: its hash is {digest.hexdigest()}, not {kept}. Delete {path.resolve()} and "
            "try again."
        )
