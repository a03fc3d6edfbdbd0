"""Weights in safetensors files: checked, read one shard at a time onto their devices, and written."""

from collections.abc import Iterator, Mapping
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxrl_reason.data import hub
from jaxrl_reason.models.formats.tensors import PretrainedError, Tensor, Weights

Tree = Mapping[str, Any]  # in the structure of the parameters
_DTYPES = ("F32", "BF16", "F16")
_INDEX = "model.safetensors.index.json"
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".masked_bias")  # in old files; computed, not trained


class SafetensorsDirectory:
    """Safetensors of a directory, see `Weights`. As in `transformers`, model.safetensors goes before an index.

    Raises PretrainedError if a file is missing, damaged or not indexed.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self.where = str(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        alone = inside(directory, "model.safetensors")
        if alone.is_file():
            with open_safetensors(alone) as file:
                self._file_of = dict.fromkeys(file.keys(), alone)
        elif inside(directory, _INDEX).is_file():
            self._file_of = _read_index(directory)
        else:
            pickles = [p.name for p in directory.glob("*.bin")] + [p.name for p in directory.glob("*.pt*")]
            hint = f" It has {pickles[0]}, a pickle, which can run code: convert it to safetensors." if pickles else ""
            raise PretrainedError(f"There is no model.safetensors and no {_INDEX} in {directory}.{hint}")
        for path in dict.fromkeys(self._file_of.values()):
            self._read_shapes(path)

    def _read_shapes(self, path: pathlib.Path) -> None:
        with open_safetensors(path) as file:
            held, indexed = set(file.keys()), {n for n, p in self._file_of.items() if p == path}
            for name in sorted(held - indexed):
                raise PretrainedError(f"{path} holds a tensor that the index does not assign to it: {name}.")
            for name in sorted(indexed - held):
                raise PretrainedError(f"{path} lacks a tensor of the index: {name}.")
            for name in indexed:
                part = file.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _DTYPES:
                    allowed = f"weights must be one of {', '.join(_DTYPES)}"
                    raise PretrainedError(f"{path}: {name} has dtype {dtype}; {allowed}.")
                self.shapes[name] = tuple(part.get_shape())

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor."""
        with open_safetensors(self._file_of[name]) as file:  # opened anew each time: mapped memory is released
            return file.get_slice(name)[part]


def open_safetensors(path: pathlib.Path):
    """Opens a safetensors file; raises a PretrainedError if it is damaged."""
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as e:
        raise PretrainedError(f"{path} is not a whole safetensors file: {e}.") from e


def _read_index(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    path = directory / _INDEX
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise PretrainedError(f"{path} has no weight_map from tensor names to file names.")
    for name, file in index.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
            wanted = "it must be the name of a .safetensors file in the same directory."
            raise PretrainedError(f"{path} puts {name} into {file!r}; {wanted}")
        if not inside(directory, file).is_file():
            raise PretrainedError(f"{path} names {file}, and there is no such file.")
    return {name: directory / file for name, file in index.items()}


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a file in a directory; raises a PretrainedError if it leads out of the directory, see `hub.inside`."""
    try:
        return hub.inside(directory, name)
    except hub.HubError as e:
        raise PretrainedError(str(e)) from e


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads the object in a JSON file; raises a PretrainedError if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise PretrainedError(f"There is no {path}.") from e
    except (ValueError, RecursionError) as e:
        raise PretrainedError(f"{path} is not JSON: {e}.") from e
    if not isinstance(content, dict):
        raise PretrainedError(f"{path} holds a JSON {type(content).__name__}; it must hold an object.")
    return content


def check(weights: Weights, table: Tree, *, tied: bool) -> None:
    """Raises PretrainedError, with their names, if tensors are missing, surplus or have another shape than in `table`.

    Some writers store the output head although it is the embedding (`tied`). It must then equal the embedding.
    """
    wanted = {name: t.shape for t in _leaves(table) for name in t.names}
    missing = [name for name in wanted if name not in weights.shapes]
    if missing:
        raise PretrainedError(f"{weights.where} lacks {_listed(missing)}.")
    surplus = [name for name in weights.shapes if name not in wanted and not name.endswith(_BUFFERS)]
    if tied and surplus == ["lm_head.weight"] and weights.shapes[surplus[0]] == wanted["model.embed_tokens.weight"]:
        _check_tied_head(weights)
        surplus = []
    if surplus:
        raise PretrainedError(f"{weights.where} has {_listed(surplus)}, which its config.json has no place for.")
    for name, shape in wanted.items():
        found = weights.shapes[name]
        if found != shape:
            raise PretrainedError(
                f"{weights.where}: {name} has shape {list(found)}, and config.json requires {list(shape)}."
            )


def _check_tied_head(weights: Weights) -> None:
    rows, width = weights.shapes["lm_head.weight"]
    for start in range(0, rows, 4096):
        part = slice(start, min(start + 4096, rows)), slice(0, width)
        if not np.array_equal(weights.read("lm_head.weight", part), weights.read("model.embed_tokens.weight", part)):
            raise PretrainedError(
                f"{weights.where}: config.json ties the output head to the embedding, and lm_head.weight differs from it."
            )


def place(weights: Weights, table: Tree, abstract: Tree, shardings: Tree) -> dict[str, Any]:
    """Reads every weight into its shards and casts it; the host holds at most one weight at a time.

    The weights must have passed `check`. The trees have a `Tensor`, a ShapeDtypeStruct and a Sharding per weight.
    """

    def one(tensor: Tensor, like: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        seen: dict[tuple, np.ndarray] = {}  # a shard that several devices hold is read once

        def shard(index):
            index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, like.shape))
            key = tuple((s.start, s.stop) for s in index)
            if key not in seen:
                seen[key] = _read(weights, tensor, like, index)
            return seen[key]

        return jax.block_until_ready(jax.make_array_from_callback(like.shape, sharding, shard))

    return jax.tree.map(one, table, abstract, shardings, is_leaf=lambda x: isinstance(x, Tensor))


def _read(weights: Weights, tensor: Tensor, like: jax.ShapeDtypeStruct, index: tuple[slice, ...]) -> np.ndarray:
    inner = index[1:] if tensor.stacked else index
    part = inner[::-1] if tensor.transposed else inner
    part = (slice(0, 1),) * (len(tensor.shape) - len(part)) + part  # a reward head has one row
    names = tensor.names[index[0]] if tensor.stacked else tensor.names
    out = np.empty([s.stop - s.start for s in index], jnp.dtype(like.dtype))
    for name, rows in zip(names, out if tensor.stacked else [out]):
        found = weights.read(name, part)
        rows[...] = found.T if tensor.transposed else found.reshape(rows.shape)
    return out


def write(directory: pathlib.Path, params: Tree, table: Tree, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or several files and their index. The host holds the tensors of one file at a time.

    The table has a `Tensor` per weight. A tensor larger than `max_shard_bytes` has a file of its own.
    """
    files: list[list] = [[]]
    held = total = 0
    for t, leaf in zip(_leaves(table), jax.tree.leaves(params)):
        size = int(np.prod(t.shape)) * leaf.dtype.itemsize
        for i, name in enumerate(t.names):
            if files[-1] and held + size > max_shard_bytes:
                files.append([])
                held = 0
            files[-1].append((name, leaf, i if t.stacked else None, t))
            held, total = held + size, total + size
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        index = {entry[0]: name for name, entries in zip(names, files) for entry in entries}
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (directory / _INDEX).write_text(json.dumps(content, indent=2) + "\n")
    for file, entries in zip(names, files):
        tensors = {}
        for name, leaf, layer, t in entries:
            found = np.asarray(leaf if layer is None else leaf[layer])
            tensors[name] = np.ascontiguousarray(found.T if t.transposed else found.reshape(t.shape))
        save_tensors(directory / file, tensors)


def save_tensors(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file with the mode of every other new file; the library lets nobody but the owner read it.

    Raises OSError on failure.
    """
    file.touch()
    mode = file.stat().st_mode & 0o777
    try:
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as e:  # such as a full disk
        raise OSError(f"{file} cannot be written: {e}") from e
    file.chmod(mode)


def _leaves(table: Tree) -> Iterator[Tensor]:
    return iter(jax.tree.leaves(table, is_leaf=lambda x: isinstance(x, Tensor)))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more tensors" if len(names) > 4 else "")
