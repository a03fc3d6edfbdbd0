"""Opens data sets of TFDS, which prepares them on first use: one sentence instead of its progress bars and logs."""

from collections.abc import Iterator
import contextlib
import http.client
import io
import logging
import pathlib
import sys
from typing import Any
import urllib.error
import urllib.parse
import urllib.request

_ADDRESSES = {"gsm8k": "https://raw.githubusercontent.com"}  # of data sets whose addresses TFDS does not list
_PATIENCE_S = 10.0  # to wait for an answer


def open_split(name: str, split: str, folder: pathlib.Path | None, kind: str) -> Any:
    """Returns a split as a random-access data source, or None for an unknown name.

    TFDS prepares the data set if it is not prepared yet. `folder` holds prepared data; None means TFDS's default; `kind`
    is the noun in messages. Raises ValueError for an unknown split and if the data need a package that is not installed,
    and OSError if they cannot be downloaded or written.
    """
    import tensorflow_datasets as tfds  # costs a fifth of a second; files do not need it

    open_it = lambda: tfds.builder(name, data_dir=folder, file_format="array_record")  # the default needs TensorFlow
    try:
        tfds.core.naming.parse_builder_name_kwargs(name)
    except ValueError:
        return None
    with _quiet(tfds):
        try:
            builder = open_it()
        except tfds.core.DatasetNotFoundError:
            return None
        except ValueError as error:
            base, _, config = name.partition(":")[0].partition("/")
            configs = tfds.builder_cls(base).builder_configs
            if not config or config in configs:
                raise
            only = f", only {', '.join(configs)}" if configs else ""
            raise ValueError(f"{base!r} has no {config!r}{only}.") from error
        prepared = builder.is_prepared()
    if not prepared:
        _prepare(tfds, builder, f"{kind} {name!r}")
        builder = open_it()  # another process may have prepared the data in the meantime
    return builder.as_data_source(split=split)


def _prepare(tfds: Any, builder: Any, what: str) -> None:
    generated = type(builder).__module__.startswith(__package__)  # by a builder of ours, without network
    url = None if generated else _an_address(builder)
    how = (
        "generated"
        if generated
        else "downloaded"
        if url
        else "downloaded (without a network this fails after some minutes)"
    )
    print(f"The {what} is being {how}; it will be in {builder.data_dir}.", file=sys.stderr, flush=True)
    try:
        if url:
            _check_reachable(url)
        with _quiet(tfds):
            builder.download_and_prepare()
    except FileExistsError:
        return  # another process has prepared the data
    except ImportError as error:
        raise ValueError(str(error) if generated else f"The {what} cannot be prepared: {error}.") from error
    except (OSError, tfds.core.download.DownloadError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = (
            "" if generated else " Check the network, or name a folder with the prepared data (config.data.data_dir)."
        )
        raise OSError(
            f"The {what} could not be prepared in {builder.data_dir}: {reason.rstrip('.')}.{remedy}"
        ) from error


def _an_address(builder: Any) -> str | None:
    """Returns an address from which TFDS downloads a data set, or None if TFDS does not state any."""
    return _ADDRESSES.get(builder.name) or next(iter(builder.url_infos or ()), None)


def _check_reachable(url: str) -> None:
    """Raises OSError within seconds if no server answers at the address. TFDS would try for minutes."""
    server = urllib.parse.urlsplit(url)
    if server.scheme not in ("http", "https"):
        return
    request = urllib.request.Request(f"{server.scheme}://{server.netloc}", method="HEAD")
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # an answer
            urllib.request.urlopen(request, timeout=_PATIENCE_S).close()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{server.hostname} cannot be reached ({getattr(error, 'reason', error)})") from error


@contextlib.contextmanager
def _quiet(tfds: Any) -> Iterator[None]:
    """Silences the progress bars of TFDS, what it prints, and warnings in the logs of TFDS and of its downloads.

    After an error all but the printing stays silent: other threads may still try to download.
    """
    levels = {logger: logger.level for logger in map(logging.getLogger, ("absl", "urllib3"))}
    tfds.display_progress_bar(False)
    for logger in levels:
        logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    tfds.display_progress_bar(True)
    for logger, level in levels.items():
        logger.setLevel(level)
