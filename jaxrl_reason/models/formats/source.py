"""Opening a model: a directory, an id of the hub or a .gguf file is found, and all but the values of its weights is read."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any
import warnings

from jaxrl_reason.data import hub
from jaxrl_reason.data.tokenizer import fitted, load_tokenizer, Tokenizer
from jaxrl_reason.models.formats import families, gguf, peft
from jaxrl_reason.models.formats.tensors import Opened, PretrainedError
from jaxrl_reason.models.formats.weights import inside, read_json, SafetensorsDirectory

# The commit of a model of the hub, kept in our copy of its config.json under the name that `transformers` uses.
REVISION = "_commit_hash"
ADAPTED = "_adapted_from"  # in our copy of config.json: the base model of a PEFT directory, at its commit
TEXTS = "jaxrl_reason"  # in the config.json of a reward model that was trained here: how its training made texts
Address = str | pathlib.Path  # a directory, a .gguf file, or an id of the hub


def open_model(path_or_hub_id: Address) -> Opened:
    """Finds a model and reads all but the values of its weights; downloads it if it is an id of the hub.

    A PEFT directory is opened as its base model, with the adapters added to the weights.
    """
    return _open(*_find(path_or_hub_id), base=None)


def reopen(path_or_hub_id: str, source: Mapping[str, Any]) -> Opened:
    """Opens a model again, at the commits that `source`, a kept config.json, names: branches may have moved since."""
    return _open(*_find(pinned(path_or_hub_id, source)), base=source.get(ADAPTED))


def _open(path: pathlib.Path, revision: str, base: str | None) -> Opened:
    if path.suffix == ".gguf":
        return gguf.open_file(path)
    if peft.is_adapter(path):
        return _open_adapter(path, revision, base or peft.base_of(path))
    files, source = tokenizer_files(path), _read_config(path)
    if "data_fingerprint" in source and "model_type" not in source:
        raise PretrainedError(f"{path} is the work directory of a run; export it first: {_export_of(path)}")
    config = families.read_config(source, str(path / "config.json"))
    if revision:
        source[REVISION] = revision
    return Opened(config, SafetensorsDirectory(path), _tokenizer(path, config.vocab_size), source, files)


def _export_of(path: pathlib.Path) -> str:
    """Returns the command that exports the model of a run, or its reward model."""
    judge = path.name == "reward_model" and (path.parent / "config.json").is_file()
    workdir = f"{path.parent} --reward-model" if judge else str(path)
    return f"python -m jaxrl_reason.export --workdir={workdir} --out=DIR"


def _tokenizer(path: pathlib.Path, size: int) -> Tokenizer | None:
    try:
        return fitted(load_tokenizer(path), size) if (path / "tokenizer.json").exists() else None
    except ValueError as e:
        raise PretrainedError(f"{path}: {e}") from e


def _open_adapter(path: pathlib.Path, revision: str, address: str) -> Opened:
    """Opens a PEFT directory; its own tokenizer, if it has one, keeps the end tokens of the base model."""
    try:
        directory, commit = _find(address)
    except PretrainedError as e:
        raise PretrainedError(f"{path / peft.CONFIG} names the base model {address!r}: {e}") from e
    if directory.is_dir() and peft.is_adapter(directory):
        raise PretrainedError(f"{path} has adapters for {directory}, which holds adapters too: merge those first.")
    base = _open(directory, commit, None)
    tokenizer, files = _tokenizer(path, base.config.vocab_size), tokenizer_files(path)
    if tokenizer is None:
        tokenizer, files = base.tokenizer, dict(base.files)
    elif base.tokenizer is not None:
        more = [i for i in base.tokenizer.eos_ids if tokenizer.spelled(i) == base.tokenizer.spelled(i)]
        tokenizer = dataclasses.replace(tokenizer, eos_ids=tuple(dict.fromkeys([*tokenizer.eos_ids, *more])))
        name = "generation_config.json"
        files |= {name: base.files[name]} if name in base.files and name not in files else {}
    source = {name: value for name, value in base.source.items() if name != REVISION}
    source |= {ADAPTED: hub.at_revision(address, commit) if commit else address}
    source |= {REVISION: revision} if revision else {}
    return Opened(base.config, peft.Adapted(base.weights, path), tokenizer, source, files)


def read_source(path_or_hub_id: Address) -> Mapping[str, Any]:
    """Reads the config.json of a model, or the equivalent fields of a .gguf file. Needs no weights, and downloads none."""
    directory = pathlib.Path(path_or_hub_id).expanduser()
    if directory.suffix == ".gguf" and directory.is_file():
        return open_model(directory).source
    if not directory.is_dir():
        if not hub.is_address(str(path_or_hub_id)):
            raise PretrainedError(f"There is no directory {directory} with a config.json, and it is no id of the hub.")
        try:
            directory = hub.fetch(str(path_or_hub_id), ["config.json", peft.CONFIG]).directory
        except hub.HubError as e:
            raise PretrainedError(str(e)) from e
    alone = peft.is_adapter(directory) and not (directory / "config.json").is_file()
    return read_source(peft.base_of(directory)) if alone else _read_config(directory)


def pinned(path_or_hub_id: str, source: Mapping[str, Any]) -> str:
    """Returns the model at the commit that `source`, a kept config.json, names: its branch may have moved since."""
    local = pathlib.Path(path_or_hub_id).expanduser().exists() or not hub.is_address(path_or_hub_id)
    return path_or_hub_id if local or REVISION not in source else hub.at_revision(path_or_hub_id, source[REVISION])


def tokenizer_files(directory: pathlib.Path) -> dict[str, bytes]:
    """Reads the tokenizer's files, which an export writes again, by name, without names of code; raises PretrainedError if a link leads outside."""
    paths = {name: inside(directory, name) for name in hub.TOKENIZER_FILES}
    files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    if b'"auto_map"' in files.get("tokenizer_config.json", b""):
        content = read_json(paths["tokenizer_config.json"])
        content.pop("auto_map", None)
        files["tokenizer_config.json"] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _find(path_or_hub_id: Address) -> tuple[pathlib.Path, str]:
    """Returns the directory or .gguf file, and the commit of a model from the hub or its cache (otherwise "")."""
    path = pathlib.Path(path_or_hub_id).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path, ""
    if path.exists():
        raise PretrainedError(f"{path} is neither a directory nor a .gguf file.")
    name = str(path_or_hub_id)
    if not hub.is_address(name):
        example = "an id of the hub such as Qwen/Qwen3-0.6B or Qwen/Qwen3-0.6B@REVISION"
        raise PretrainedError(f"There is no {name}: give a directory, a .gguf file, or {example}.")
    # README.md names the licence, for the card of an export.
    wanted = [
        "config.json",
        peft.CONFIG,
        "*.safetensors",
        "model.safetensors.index.json",
        *hub.TOKENIZER_FILES,
        "README.md",
    ]
    try:
        # Some repositories hold the weights twice; the second copy is in the format of their maker.
        fetched = hub.fetch(name, wanted, ignored=["consolidated*"])
    except hub.HubError as e:
        raise PretrainedError(f"There is no directory {name}, and {e}") from e
    return fetched.directory, fetched.revision


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
    """Reads the config.json of a directory; warns if it names code, which is never run.

    The names under which we keep where a model came from are left out: files of others can have them, and then a directory would
    seem to be of the hub.
    """
    file = inside(directory, "config.json")
    source = {name: value for name, value in read_json(file).items() if name not in (REVISION, ADAPTED)}
    if "auto_map" in source:
        note = "names code of the model's own (auto_map), which is never run: only its model_type decides how the model is read."
        warnings.warn(f"{file} {note}", stacklevel=3)
    return source
