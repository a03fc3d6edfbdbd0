"""Checkpoints: orbax's manager around a TrainState, for both phases of a run.

Checkpoints are numbered through the whole run: supervised steps first, RL steps behind them. The RL
phase begins with a checkpoint of its own (its step 0), which is never older than the supervised end.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import gc
import itertools
import logging
import pathlib
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
# What orbax raises on damaged files.
_UNREADABLE = (ValueError, KeyError, OSError, TypeError, AttributeError, RecursionError, NotImplementedError)
_UNWRITABLE = (ValueError, OSError)  # and on full disks
_DIGESTS = "digests"  # of the arrays, beside the parts of a state


class CheckpointError(ValueError):
    """Weights that cannot be saved or read again; the message is a sentence that names them."""


class Checkpoints:
    """Saves and restores TrainStates under `directory`, keeping the newest `keep`.

    Raises:
      CheckpointError: the directory cannot be made or read.
    """

    def __init__(self, directory: pathlib.Path, keep: int):
        self.directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        # Without a handler orbax infers one from the newest checkpoint, and a damaged one misleads it about all.
        handler = ocp.StandardCheckpointHandler()
        with _failing(_UNREADABLE, f"Checkpoints cannot be kept in {self.directory}"):
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, number: int, state: TrainState) -> None:
        """Saves, complete or not at all, and then removes what is more than `keep`.

        Raises:
          CheckpointError: it cannot be written.
        """
        if number == self.latest():
            return
        with _failing(_UNWRITABLE, f"Checkpoint {self.directory / str(number)} cannot be written"):
            self._manager.save(number, args=ocp.args.StandardSave(_with_digests(state._asdict())))

    def restore(self, like: TrainState) -> tuple[int, TrainState] | None:
        """The newest readable checkpoint in the shapes, dtypes and shardings of `like` (arrays or ShapeDtypeStructs), or None.

        Newer ones that cannot be read, of several processes by one of them, are renamed to damaged-<number>, with a warning: they no
        longer count among those that are kept, and the run writes their steps again.

        Raises:
          CheckpointError: there are checkpoints, and none can be read; all stay as they are.
        """
        numbers = hosts.from_first(sorted(self._manager.all_steps(), reverse=True))
        number, parts, faults = read_newest(self.directory, numbers, like._asdict())
        if number is not None:
            for bad, fault in faults.items():
                self._put_aside(bad, fault)
            return number, TrainState(**parts)
        if faults:
            newest, fault = next(iter(faults.items()))
            raise CheckpointError(
                f"None of the checkpoints under {self.directory} can be read; the newest ({newest}): {fault}"
            )
        return None

    def _put_aside(self, number: int, fault: str) -> None:
        def rename():
            path = self.directory / str(number)
            names = itertools.chain([f"damaged-{number}"], (f"damaged-{number}-{i}" for i in itertools.count(2)))
            aside = next(p for p in map(self.directory.joinpath, names) if not p.exists())
            path.rename(aside)
            _log.warning("Checkpoint %s cannot be read and is skipped; it is now %s: %s", path, aside.name, fault)

        hosts.agree(lambda: rename() if hosts.first() else None, OSError)
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()


def read_newest(
    directory: pathlib.Path, numbers: Sequence[int], like: Mapping[str, Any]
) -> tuple[int | None, dict[str, Any], dict[int, str]]:
    """Parts of the TrainState out of the first of some checkpoints that can be read.

    Args:
      directory: of the checkpoints.
      numbers: of those to try, in this order.
      like: for each field that is wanted, arrays or ShapeDtypeStructs with the shardings to read it in.

    Returns:
      The number of the checkpoint, or None; the fields by their names; and of those before it what is wrong with each: it cannot be
      read, of several processes by one of them, or is not what was saved.
    """
    faults = {}
    for number in numbers:

        def read():
            with _failing((hub.HubError,)):
                hub.inside(directory, str(number))
            return _restored(directory / str(number) / "default", like)

        try:
            return number, _read_by_all(read, like), faults
        except CheckpointError as e:
            faults[number] = str(e)
        gc.collect()  # arrays that were read hang in cycles of what has failed
    return None, {}, faults


def save_params(directory: pathlib.Path, params) -> None:
    """Weights alone, complete or absent; replaces what is there.

    Raises:
      CheckpointError: they cannot be written.
    """
    with _failing(_UNWRITABLE, f"The weights {directory} cannot be written"):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory.resolve(), _with_digests({"params": params}), force=True)


def load_params(directory: pathlib.Path, like):
    """Weights in the shapes, dtypes and shardings of `like`.

    Raises:
      CheckpointError: they cannot be read, of several processes by one of them, or are not what was saved.
    """
    parts = {"params": like}
    with _failing((CheckpointError,), f"The weights {directory} cannot be read"):
        return _read_by_all(lambda: _restored(directory.resolve(), parts), parts)["params"]


def _read_by_all(read: Callable[[], dict[str, Any]], like: Mapping[str, Any]) -> dict[str, Any]:
    """What `_restored` gives, if it is what was saved, in the dtypes of `like`; where one process fails, all do."""
    parts = hosts.agree(read, CheckpointError)
    saved, found = parts.pop(_DIGESTS), digests.of(parts)

    def compare():
        if other := digests.first_difference(found, saved):
            name, i = other
            array = list(_by_name({name: parts[name]}))[i]
            raise CheckpointError(f"{array} is not what was saved: its file is damaged.")

    hosts.agree(compare, CheckpointError)  # of the copies of an array one may be wrong, and only its process see it
    return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), parts, dict(like))


def _restored(directory: pathlib.Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """The named parts of what a directory of orbax's holds, in the dtypes they have there, and all digests.

    Every process reads for itself: where one fails, the others would wait for it in orbax.

    Raises:
      CheckpointError: it cannot be read, or holds other shapes.
    """
    mine = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=mine, active_processes={mine})
    handler = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=alone,
        # A registry of its own: the primary host above would also become that of what is saved with the common one.
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, ocp.type_handlers.ArrayHandler(primary_host=mine))
        ),
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        if not directory.is_dir():
            raise CheckpointError(f"There is no directory {directory}.")
        with _failing(_UNREADABLE, "What describes its arrays cannot be read"):
            saved = handler.metadata(directory).tree
        if _DIGESTS not in saved:
            raise CheckpointError("It has no digests of its arrays, so that it was not written by this version.")
        there, here = (_by_name({name: tree[name] for name in like}) for tree in (saved, like))
        for name in here | there:
            shapes = [tuple(side[name].shape) if name in side else "missing" for side in (there, here)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"It holds other shapes than the configuration and the tokenizer ask for: {name} is {shapes[0]} there and "
                    f"{shapes[1]} here."
                )
        as_saved = lambda path, x: jax.ShapeDtypeStruct(x.shape, there[_name(path)].dtype, sharding=x.sharding)
        item = jax.tree_util.tree_map_with_path(as_saved, dict(like))
        item[_DIGESTS] = digests.abstract(item)
        restore = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        with _failing(_UNREADABLE):
            try:
                return reader.restore(directory, args=restore)
            except Exception as e:
                if type(e) is Exception and isinstance(
                    e.__cause__, _UNREADABLE
                ):  # so orbax says that a file is damaged
                    raise e.__cause__
                raise


def _with_digests(parts: dict[str, Any]) -> dict[str, Any]:
    return parts | {_DIGESTS: digests.of(parts)}


def _by_name(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, or what describes them, by their names, whatever containers they stand in."""
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(dict(parts)) if hasattr(x, "shape")}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def save_batch(file: pathlib.Path, batch: Experience, rewards: Mapping[str, np.ndarray]) -> None:
    """Writes what an update learnt from, and the rewards by name, to a .npz file that is complete or absent.

    Raises:
      CheckpointError: it cannot be written.
    """
    parts = {"batch": batch, "rewards": dict(rewards)}
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    scratch = file.with_name(f"{file.name}.tmp")
    with _failing(_UNWRITABLE, f"{file} cannot be written"):
        with scratch.open("wb") as out:
            np.savez(out, **arrays)
        scratch.replace(file)


def load_batch(file: pathlib.Path) -> tuple[Experience, dict[str, np.ndarray]]:
    """Returns the batch and the rewards that `save_batch` has written.

    Raises:
      CheckpointError: they cannot be read.
    """
    parts: dict[str, Any] = {}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for key, x in arrays.items():
                *path, leaf = key.split(".")
                functools.reduce(lambda at, name: at.setdefault(name, {}), path, parts)[leaf] = x
        batch = parts["batch"]
        return Experience(**batch | {"rollout": Rollout(**batch["rollout"])}), parts["rewards"]
    except (*_UNREADABLE, zipfile.BadZipFile) as e:
        raise CheckpointError(f"The batch {file} cannot be read: {_in_short(e)}") from e


@contextlib.contextmanager
def _failing(errors: tuple[type[Exception], ...], what: str = ""):
    """Around what orbax does: where it raises one of `errors`, a CheckpointError says so.

    Raises:
      CheckpointError: `what`, and why.
    """
    _silence_echoes()
    try:
        yield
    except errors as e:
        raise CheckpointError(f"{what}: {_in_short(e)}" if what else _in_short(e)) from e


# What orbax raises here its threads also log, and asyncio once it collects them: by logger, how these lines are known.
_ECHOES = {"absl": "_SignalingThread.run() raised an exception", "asyncio": "exception was never retrieved"}
# What those raise that nobody waits for any more, and those that finish later.
_LEFT_BEHIND = ("Event loop is closed", "Encountered error while reading array index")


def _silence_echoes() -> None:
    """From now on a checkpoint that cannot be read or written is one sentence, not a page of tracebacks around it."""
    for name in _ECHOES:
        logging.getLogger(name).addFilter(_no_echo)  # which adds the same filter once
    hook = sys.unraisablehook
    if getattr(hook, "__name__", "") != _but_of_readers.__name__:
        sys.unraisablehook = _but_of_readers(hook)


def _no_echo(record: logging.LogRecord) -> bool:
    return _ECHOES[record.name] not in record.getMessage()


def _but_of_readers(hook):
    def told(unraisable):
        if not str(unraisable.exc_value).startswith(_LEFT_BEHIND):
            hook(unraisable)

    told.__name__ = _but_of_readers.__name__
    return told


def _in_short(error: Exception) -> str:
    """The beginning of a message: those of tensorstore go on with pages of its settings."""
    text = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
    return textwrap.shorten(text, 300, placeholder=" ...") or type(error).__name__
