"""Opening a model: a directory, an id of the hub or a .gguf file is found, and all but the values of its weights is read."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any
import warnings

from jaxrl_reason.data import hub
from jaxrl_reason.data.tokenizer import fitted, load_tokenizer
from jaxrl_reason.models.formats import families, gguf
from jaxrl_reason.models.formats.tensors import Opened, PretrainedError
from jaxrl_reason.models.formats.weights import inside, read_json, SafetensorsDirectory

# Files of the tokenizer next to the weights; an export writes them unchanged.
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
# The commit of a model of the hub, kept in our copy of its config.json under the name that `transformers` uses.
REVISION = "_commit_hash"
Address = str | pathlib.Path  # a directory, a .gguf file, or an id of the hub


def open_model(path_or_hub_id: Address) -> Opened:
    """Finds a model and reads all but the values of its weights; downloads it if it is an id of the hub."""
    path, revision = _find(path_or_hub_id)
    if path.suffix == ".gguf":
        return gguf.open_file(path)
    files, source = tokenizer_files(path), _read_config(path)
    config = families.read_config(source, str(path / "config.json"))
    if revision:
        source[REVISION] = revision
    try:
        known = (path / "tokenizer.json").exists()
        tokenizer = fitted(load_tokenizer(path), config.vocab_size) if known else None
    except ValueError as e:
        raise PretrainedError(f"{path}: {e}") from e
    return Opened(config, SafetensorsDirectory(path), tokenizer, source, files)


def read_source(path_or_hub_id: Address) -> Mapping[str, Any]:
    """Reads the config.json of a model, or the equivalent fields of a .gguf file. Needs no weights, and downloads none."""
    directory = pathlib.Path(path_or_hub_id).expanduser()
    if directory.suffix == ".gguf" and directory.is_file():
        return open_model(directory).source
    if not directory.is_dir():
        if not hub.is_address(str(path_or_hub_id)):
            raise PretrainedError(f"There is no directory {directory} with a config.json, and it is no id of the hub.")
        try:
            directory = hub.fetch(str(path_or_hub_id), ["config.json"]).directory
        except hub.HubError as e:
            raise PretrainedError(str(e)) from e
    return _read_config(directory)


def pinned(path_or_hub_id: str, source: Mapping[str, Any]) -> str:
    """Returns the model at the commit that `source`, a kept config.json, names: its branch may have moved since."""
    local = pathlib.Path(path_or_hub_id).expanduser().exists() or not hub.is_address(path_or_hub_id)
    return path_or_hub_id if local or REVISION not in source else hub.at_revision(path_or_hub_id, source[REVISION])


def tokenizer_files(directory: pathlib.Path) -> dict[str, bytes]:
    """Reads the tokenizer's files, by name, without names of code; raises PretrainedError if a link leads outside."""
    paths = {name: inside(directory, name) for name in _FILES}
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
    wanted = ["config.json", "*.safetensors", "model.safetensors.index.json", *_FILES]
    try:
        # Some repositories hold the weights twice; the second copy is in the format of their maker.
        fetched = hub.fetch(name, wanted, ignored=["consolidated*"])
    except hub.HubError as e:
        raise PretrainedError(f"There is no directory {name}, and {e}") from e
    return fetched.directory, fetched.revision


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
    """Reads the config.json of a directory; warns if it names code, which is never run."""
    file = inside(directory, "config.json")
    source = read_json(file)
    if "auto_map" in source:
        note = "names code of the model's own (auto_map), which is never run: only its model_type decides how the model is read."
        warnings.warn(f"{file} {note}", stacklevel=3)
    return source
