"""Paths that are addresses of other machines, such as gs://bucket/run: refused before pathlib makes a local folder of them."""

import pathlib
import re

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+([^/]*)/?(.*)")  # pathlib turns gs://bucket into gs:/bucket
# scheme -> how a machine gets the files.
_MOUNT = "mount the bucket ({}), and name the folder under which it is mounted"
_REMEDIES = {
    "gs": _MOUNT.format("gcsfuse {1} DIR")
    + "; for a work directory, better use a Filestore share, or a local folder and copy it (gcloud storage rsync --recursive DIR {2})",
    **dict.fromkeys(("s3", "s3a", "s3n"), _MOUNT.format("mount-s3 {1} DIR")),
    **dict.fromkeys(("abfs", "abfss", "az", "wasb", "wasbs"), _MOUNT.format("blobfuse2 mount DIR")),
    **dict.fromkeys(("http", "https", "ftp"), "download it, and name the file or folder"),
    "hf": "name a model by its id OWNER/NAME, and data by hf://datasets/OWNER/NAME/PATH",
    "file": "leave out {0}://",
}


def has_unknown_user(text: str) -> bool:
    """Returns whether a path begins with the home directory of a user who does not exist, as ~runs/x where ~/runs/x is meant."""
    try:
        pathlib.Path(text).expanduser()
    except RuntimeError:
        return True
    return False


def remote(text: str, supported: tuple[str, ...] = ()) -> str:
    """Returns the remedy for a path that is an address of another machine, such as gs://bucket/run; "" for other paths.

    Addresses that begin with one of `supported` are paths as well.

    Example:
      >>> remote("gs://bucket/run")
      'mount the bucket (gcsfuse bucket DIR), and name the folder under which it is mounted; for a work directory, ...'
    """
    found = _ADDRESS.fullmatch(text)
    if not found or text.startswith(supported):
        return ""
    scheme = found[1].lower()
    remedy = _REMEDIES.get(scheme, "mount what {0}:// names, and name the folder under which it is mounted")
    return remedy.format(scheme, found[2], f"{scheme}://{found[2]}/{found[3]}".rstrip("/"))
