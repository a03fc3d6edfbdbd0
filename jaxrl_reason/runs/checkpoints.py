"""Checkpoints of a TrainState, by orbax's manager, for both phases of a run.

Checkpoints are numbered through the whole run: first the supervised steps, then the RL steps. The RL phase begins with
a checkpoint of its own (its step 0), which is never older than the end of the supervised phase.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import gc
import itertools
import logging
import pathlib
import re
import shutil
import sys
import textwrap
from typing import Any
import zipfile

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl_reason.data import hub
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.types import Experience, Rollout, TrainState
from jaxrl_reason.runs import digests

_log = logging.getLogger(__name__)
# Errors of orbax on damaged files.
_UNREADABLE = (ValueError, KeyError, OSError, TypeError, AttributeError, RecursionError, NotImplementedError)
_UNWRITABLE = (ValueError, OSError)  # errors of orbax on full disks
_DIGESTS = "digests"  # the name of the digests, next to the parts of a state
_REMOVED = "removed"  # the folder of checkpoints that are being removed
_HALF_WRITTEN = ".orbax-checkpoint-tmp"  # in the names of orbax for what it is writing


class CheckpointError(ValueError):
    """A checkpoint, weights or a batch cannot be written or read; the message names the file."""


class Checkpoints:
    """Saves and restores TrainStates; keeps the newest `keep`. Raises CheckpointError for an unusable `directory`."""

    def __init__(self, directory: pathlib.Path, keep: int):
        self.directory = directory.resolve()
        # Checkpoints beyond `keep` are renamed before they are removed: a kill leaves none half removed.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False, todelete_subdir=_REMOVED
        )
        # Without a handler orbax infers one from the newest checkpoint; if that is damaged, it misreads all.
        handler = ocp.StandardCheckpointHandler()
        with _failing(_UNREADABLE, f"Checkpoints cannot be kept in {self.directory}"):
            hosts.agree(self._clean_up, OSError)
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)

    def save(self, number: int, state: TrainState) -> None:
        """Saves a state, complete or not at all, and removes the oldest beyond `keep`; or raises CheckpointError."""
        if number == self._manager.latest_step():
            return
        with _failing(_UNWRITABLE, f"Checkpoint {self.directory / str(number)} cannot be written"):
            self._manager.save(number, args=ocp.args.StandardSave(_with_digests(state._asdict())))
            if hosts.is_first():
                _remove(self.directory / _REMOVED)

    def _clean_up(self) -> None:
        """Removes what a kill has left: checkpoints half written, and checkpoints half removed."""
        if not hosts.is_first() or not self.directory.is_dir():
            return
        numbers = numbers_in(self.directory)
        newest = next((n for n in numbers if is_complete(self.directory / str(n))), -1)
        # A newer one is not half removed but damaged: `restore` puts it aside.
        torn = [str(n) for n in numbers if n < newest and not is_complete(self.directory / str(n))]
        for path in list(self.directory.iterdir()):
            if path.name in (_REMOVED, *torn) or _HALF_WRITTEN in path.name:
                _remove(path)

    def restore(self, like: TrainState) -> tuple[int, TrainState] | None:
        """Reads the newest readable checkpoint, and returns its number and state; None without checkpoints.

        `like` holds arrays or ShapeDtypeStructs with the shapes, dtypes and shardings of the result. A newer checkpoint
        that at least one process cannot read is renamed to damaged-<number>, with a warning. It no longer counts among
        the kept checkpoints, and the run writes its step again. Raises CheckpointError when there are checkpoints and
        none can be read; all stay as they are.
        """
        numbers = hosts.from_first(sorted(self._manager.all_steps(), reverse=True))
        number, parts, faults = read_newest(self.directory, numbers, like._asdict())
        if number is not None:
            for bad, fault in faults.items():
                self._put_aside(bad, fault)
            return number, TrainState(**parts)
        if faults:
            newest = "; the newest ({}): {}".format(*next(iter(faults.items())))
            raise CheckpointError(f"None of the checkpoints under {self.directory} can be read{newest}")
        return None

    def _put_aside(self, number: int, fault: str) -> None:
        def rename() -> None:
            path = self.directory / str(number)
            names = itertools.chain([f"damaged-{number}"], (f"damaged-{number}-{i}" for i in itertools.count(2)))
            aside = next(p for p in map(self.directory.joinpath, names) if not p.exists())
            path.rename(aside)
            _log.warning("Checkpoint %s cannot be read and is skipped; it is now %s: %s", path, aside.name, fault)

        hosts.agree(lambda: rename() if hosts.is_first() else None, OSError)
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()


def numbers_in(directory: pathlib.Path) -> list[int]:
    """Returns the file names in a directory that are numbers, largest first; none if the directory does not exist."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def is_complete(checkpoint: pathlib.Path) -> bool:
    """Returns whether a checkpoint has what reading it begins with; its arrays may be damaged all the same.

    A link counts as complete: `read_newest` decides whether it may be followed.
    """
    return checkpoint.is_symlink() or all(
        (checkpoint / "default" / name).exists() for name in ("_METADATA", "manifest.ocdbt", "d")
    )


def _remove(path: pathlib.Path) -> None:
    """Removes a directory, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)


def read_newest(
    directory: pathlib.Path, numbers: Sequence[int], like: Mapping[str, Any]
) -> tuple[int | None, dict[str, Any], dict[int, str]]:
    """Reads fields of the TrainState from the first readable one of the checkpoints `numbers`, in this order.

    `like` maps fields to arrays or ShapeDtypeStructs with the shapes, dtypes and shardings of the result. A checkpoint
    is unreadable if at least one process cannot read it, or if its arrays differ from the saved ones.
    Returns the number of the checkpoint, or None; its fields by name; the fault of each unreadable one before it.
    """
    faults: dict[int, str] = {}
    for number in numbers:

        def read() -> dict[str, Any]:
            with _failing((hub.HubError,)):
                hub.inside(directory, str(number))
            return _restored(directory / str(number) / "default", like)

        try:
            return number, _read_by_all(read, like), faults
        except CheckpointError as e:
            faults[number] = str(e)
        gc.collect()  # reference cycles of the failed read hold arrays
    return None, {}, faults


def save_params(directory: pathlib.Path, params: Any) -> None:
    """Writes weights alone, complete or absent, over an existing directory. Raises CheckpointError on failure."""
    with _failing(_UNWRITABLE, f"The weights {directory} cannot be written"):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory.resolve(), _with_digests({"params": params}), force=True)


def load_params(directory: pathlib.Path, like: Any) -> Any:
    """Reads weights in the shapes, dtypes and shardings of `like`; raises CheckpointError when a process cannot."""
    parts = {"params": like}
    with _failing((CheckpointError,), f"The weights {directory} cannot be read"):
        return _read_by_all(lambda: _restored(directory.resolve(), parts), parts)["params"]


def _read_by_all(read: Callable[[], dict[str, Any]], like: Mapping[str, Any]) -> dict[str, Any]:
    """Calls `read` on every process, checks the digests, converts to the dtypes of `like`; if one fails, all raise."""
    parts = hosts.agree(read, CheckpointError)
    saved, found = parts.pop(_DIGESTS), digests.of(parts)

    def compare() -> None:
        if other := digests.first_difference(found, saved):
            name, i = other
            array = list(_by_name({name: parts[name]}))[i]
            raise CheckpointError(f"{array} differs from the saved array: its file is damaged.")

    hosts.agree(compare, CheckpointError)  # only one copy of an array may be wrong, and only its process sees that
    return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), parts, dict(like))


def _restored(directory: pathlib.Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the fields in `like` and all digests from a directory of orbax, in the saved dtypes."""
    # Every process reads by itself: in orbax's common read the other processes wait for one that has failed.
    mine = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=mine, active_processes={mine})
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=alone,
        # A registry of its own: in the common registry, `mine` would become the primary host of later saves as well.
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, ocp.type_handlers.ArrayHandler(primary_host=mine))
        ),
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        if not directory.is_dir():
            raise CheckpointError(f"There is no directory {directory}.")
        with _failing(_UNREADABLE, "The description of its arrays cannot be read"):
            saved = handler.metadata(directory).tree
        item = _as_saved(saved, like)
        item[_DIGESTS] = digests.abstract(item)
        arrays = ocp.checkpoint_utils.construct_restore_args(item)
        restore = ocp.args.PyTreeRestore(item=item, restore_args=arrays, partial_restore=True)
        with _failing(_UNREADABLE):
            try:
                return reader.restore(directory, args=restore)
            except Exception as e:
                # orbax wraps the error of a damaged file in a bare Exception.
                if type(e) is Exception and isinstance(e.__cause__, _UNREADABLE):
                    raise e.__cause__ from None
                raise


def _as_saved(saved: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `like` in the saved dtypes; raises CheckpointError for missing digests and for other shapes."""
    if _DIGESTS not in saved:
        raise CheckpointError("It has no digests of its arrays, so another version has written it.")
    there, here = (_by_name({name: tree[name] for name in like}) for tree in (saved, like))
    for name in here | there:
        shapes = [tuple(side[name].shape) if name in side else "missing" for side in (there, here)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"It holds other shapes than the configuration and the tokenizer ask for: {name} is {shapes[0]} there and "
                f"{shapes[1]} here."
            )
    as_saved = lambda path, x: jax.ShapeDtypeStruct(x.shape, there[_name(path)].dtype, sharding=x.sharding)
    return jax.tree_util.tree_map_with_path(as_saved, dict(like))


def _with_digests(parts: dict[str, Any]) -> dict[str, Any]:
    return parts | {_DIGESTS: digests.of(parts)}


def _by_name(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arrays or their descriptions by name, for any kind of container."""
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(dict(parts)) if hasattr(x, "shape")}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def save_batch(file: pathlib.Path, batch: Experience, rewards: Mapping[str, np.ndarray]) -> None:
    """Writes a batch on the host and its rewards to a .npz file, complete or absent; or raises CheckpointError."""
    parts = {"batch": batch, "rewards": dict(rewards)}
    arrays = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(parts)}
    scratch = file.with_name(f"{file.name}.tmp")
    with _failing(_UNWRITABLE, f"{file} cannot be written"):
        with scratch.open("wb") as out:
            np.savez(out, **arrays)
        scratch.replace(file)


def load_batch(file: pathlib.Path) -> tuple[Experience, dict[str, np.ndarray]]:
    """Reads the batch and the rewards from a file of `save_batch`; raises CheckpointError for an unreadable file."""
    parts: dict[str, Any] = {}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for key, x in arrays.items():
                head, _, rest = key.partition(".")
                *path, leaf = (head, rest) if head == "rewards" else key.split(".")  # a reward's name may hold dots
                functools.reduce(lambda at, name: at.setdefault(name, {}), path, parts)[leaf] = x
        batch = parts["batch"]
        return Experience(**batch | {"rollout": Rollout(**batch["rollout"])}), parts["rewards"]
    except (*_UNREADABLE, zipfile.BadZipFile) as e:
        raise CheckpointError(f"The batch {file} cannot be read: {_in_short(e)}") from e


@contextlib.contextmanager
def _failing(errors: tuple[type[Exception], ...], what: str = "") -> Iterator[None]:
    """Turns errors of the body into a CheckpointError: the text `what`, and the error's own message."""
    _silence_echoes()
    try:
        yield
    except errors as e:
        raise CheckpointError(f"{what}: {_in_short(e)}" if what else _in_short(e)) from e


# Threads of orbax also log the errors that it raises, as does asyncio when it collects them: logger -> text of such a line.
_ECHOES = {"absl": "_SignalingThread.run() raised an exception", "asyncio": "exception was never retrieved"}
# Beginnings of errors of orbax's threads that finish after the failed read.
_LEFT_BEHIND = ("Event loop is closed", "Encountered error while reading array index")


# Of tensorstore, reading.
_DAMAGE = re.compile(r"(NOT_FOUND|DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT|OUT_OF_RANGE): ")
_FILE = re.compile(r'local file "([^"]+)"')


def _silence_echoes() -> None:
    """Hides the tracebacks that orbax's threads print around an error: a damaged checkpoint is one sentence."""
    for name in _ECHOES:
        logging.getLogger(name).addFilter(_no_echo)  # adds the same filter only once
    hook = sys.unraisablehook
    if getattr(hook, "__name__", "") != _except_of_readers.__name__:
        sys.unraisablehook = _except_of_readers(hook)


def _no_echo(record: logging.LogRecord) -> bool:
    return _ECHOES[record.name] not in record.getMessage()


def _except_of_readers(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    def filtered(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(_LEFT_BEHIND):
            hook(unraisable)

    filtered.__name__ = _except_of_readers.__name__
    return filtered


def _in_short(error: Exception) -> str:
    """Returns the beginning of a message: messages of tensorstore continue with pages of its settings."""
    text = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
    if files := _FILE.findall(text) if _DAMAGE.match(text) else []:
        return f"{files[-1]} is missing or damaged."
    return textwrap.shorten(text, 300, placeholder=" ...") or type(error).__name__
