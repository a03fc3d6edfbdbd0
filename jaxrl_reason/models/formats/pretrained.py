"""Models in the Hugging Face layout, in and out: a directory, an id of the hub, or a .gguf file.

Weights are read tensor by tensor, cast, and put into their shards; nothing in a directory is ever executed. What is written loads
in `transformers`, vLLM and llama.cpp's converter.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any
import warnings

import jax

from jaxrl_reason.data import hub
from jaxrl_reason.data.tokenizer import fitted, load_tokenizer, Tokenizer
from jaxrl_reason.models import decoder, lora, sharding
from jaxrl_reason.models import reward_model as reward_model_lib
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.formats import families
from jaxrl_reason.models.formats import weights as weights_lib
from jaxrl_reason.models.formats.families import PretrainedError

# What lies beside the weights and belongs to the tokenizer: goes out as it came in.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_REVISION = (
    "_commit_hash"  # of a model of the hub, in the config.json that is kept of it; `transformers` calls it so too
)


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A language model.

    Attributes:
      config: what it computes.
      params: its weights, a nested dict of arrays.
      tokenizer: between ids and text, or None where the directory has none.
      source: the config.json it came with, and the commit of the hub that it is of; empty for a model of our own.
      files: name -> content of the tokenizer's files it came with.
    """

    config: ModelConfig
    params: decoder.Params
    tokenizer: Tokenizer | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    def apply(self, params: decoder.Params, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Logits f32[B, S, V] of tokens int[B, S]; mask [B, S], 1 = real token, padding on any side. Pure, jit-compiled."""
        return _logits(self.config, params, tokens, mask)


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel(Policy):
    """A sequence classifier with one label; `params` are {"decoder": ..., "score": f32[D]}. See `Policy`."""

    def apply(self, params: decoder.Params, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Scores f32[B] of tokens int[B, S], read at the last real token; mask as in `Policy.apply`. Pure, jit-compiled."""
        return _scores(self.config, params, tokens, mask)


_logits = jax.jit(decoder.apply, static_argnums=0)
_scores = jax.jit(reward_model_lib.scores, static_argnums=0)


def load_pretrained(
    path_or_hub_id: str | pathlib.Path, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> Policy:
    """Reads a language model.

    Args:
      path_or_hub_id: a directory with config.json, safetensors and tokenizer.json; the id of such a model on the Hugging Face hub
        ("Qwen/Qwen3-0.6B", or with a branch, a tag or a commit "Qwen/Qwen3-0.6B@c1899de"); or a .gguf file.
      dtype: of the weights and of the operands of products, "float32" or "bfloat16".
      mesh: where the weights go, see `models.sharding`; None: the first device.

    Raises:
      PretrainedError: a sentence that names the file, field or tensor. Nothing was placed on a device then.
    """
    return _load(path_or_hub_id, dtype, mesh, Policy)


def load_reward_model(
    path_or_hub_id: str | pathlib.Path, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> RewardModel:
    """Reads a sequence classifier with one label (Qwen2ForSequenceClassification and the like); see `load_pretrained`."""
    return _load(path_or_hub_id, dtype, mesh, RewardModel)


def save_pretrained(directory: str | pathlib.Path, policy: Policy, *, max_shard_bytes: int = 4 * 2**30) -> None:
    """Writes config.json, safetensors, the tokenizer's files and generation_config.json; all of them or nothing.

    Args:
      directory: is made; may exist if it is empty.
      policy: a `Policy` or a `RewardModel`.
      max_shard_bytes: a file of weights is not larger, unless a single tensor is.

    Raises:
      PretrainedError: the directory is not empty, or no family describes this decoder.
    """
    if policy.config.lora_rank:
        raise PretrainedError(
            "This policy has adapters: merge them first (models.lora.merge), or write them by save_adapters."
        )
    content = config_json(policy)
    with _complete_or_absent(pathlib.Path(directory).expanduser()) as scratch:
        _write_json(scratch / "config.json", content)
        weights_lib.write(scratch, policy.params, _table(policy.config, type(policy)), max_shard_bytes)
        _write_tokenizer(scratch, policy)
        ids = {name: content[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in content}
        if type(policy) is Policy and not (scratch / "generation_config.json").exists():
            _write_json(scratch / "generation_config.json", {"_from_model_config": True} | ids)


def save_adapters(directory: str | pathlib.Path, policy: Policy, base_model: str) -> None:
    """Writes a policy's adapters as PEFT reads them, with the tokenizer's files; all of them or nothing.

    Args:
      directory: is made; may exist if it is empty.
      policy: with adapters.
      base_model: what PEFT puts them on, a directory or an id of the hub; this at the commit that the policy began with.

    Raises:
      PretrainedError: the directory is not empty.
    """
    with _complete_or_absent(pathlib.Path(directory).expanduser()) as scratch:
        revision = policy.source.get(_REVISION)
        base_model = hub.name_of(base_model) if revision else base_model
        lora.save_peft(scratch, policy.config, policy.params, base_model, revision)
        _write_tokenizer(scratch, policy)


@contextlib.contextmanager
def _complete_or_absent(directory: pathlib.Path):
    """A directory beside `directory` to write into, which becomes it in the end."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PretrainedError(f"{directory} is there already and not empty; choose another directory.")
    directory = directory.resolve()
    scratch = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # of an export that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if directory.exists():
            directory.rmdir()
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_tokenizer(directory: pathlib.Path, policy: Policy) -> None:
    if policy.tokenizer is not None and "tokenizer.json" not in policy.files:
        policy.tokenizer.save(directory)
    for name, content in policy.files.items():
        (directory / name).write_bytes(content)


def config_json(policy: Policy) -> dict[str, Any]:
    """What config.json says about a model: as it came, where it still describes it, with the dtype of its weights."""
    classifier = isinstance(policy, RewardModel)
    # Code that a model came with stays behind: nothing that is written here names any.
    found = {name: x for name, x in policy.source.items() if name not in (_REVISION, "auto_map")}
    dtype = policy.config.param_dtype
    free = {name: getattr(policy.config, name) for name in ("param_dtype", "compute_dtype", "remat", "attention")}
    try:
        same = bool(found) and dataclasses.replace(families.read_config(found), **free) == policy.config
    except PretrainedError:
        same = False
    t = policy.tokenizer
    ids = {}
    if t is not None:
        eos = list(t.eos_ids) if len(t.eos_ids) > 1 else t.eos_ids[0]
        ids = {"bos_token_id": t.bos_id, "eos_token_id": eos, "pad_token_id": t.pad_id}
    if same:
        found.pop("dtype", None)
        return ids | found | {"torch_dtype": dtype}
    out = families.write_config(policy.config, classifier)
    out["max_position_embeddings"] = found.get("max_position_embeddings", 4096)
    if classifier:
        out |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return out | ids


# -- reading ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A model that was looked at: everything about it but the weights' numbers.

    Attributes:
      config: float32; dtypes are the caller's choice.
      weights: where its tensors are.
      tokenizer, source, files: see `Policy`.
    """

    config: ModelConfig
    weights: weights_lib.Weights
    tokenizer: Tokenizer | None
    source: Mapping[str, Any]
    files: Mapping[str, bytes]


def open_model(path_or_hub_id: str | pathlib.Path) -> Opened:
    """Finds a model and reads all but its weights; downloads it where it is an id of the hub.

    Raises:
      PretrainedError: a sentence that names the file or the field.
    """
    path, revision = find(path_or_hub_id)
    if path.suffix == ".gguf":
        from jaxrl_reason.models.formats import gguf  # its package is an extra

        return Opened(**gguf.open_file(path))
    files = files_of(path)
    source = _read_config(path)
    config = families.read_config(source, str(path / "config.json"))
    if revision:
        source[_REVISION] = revision
    tokenizer = None
    if (path / "tokenizer.json").exists():
        try:
            tokenizer = fitted(load_tokenizer(path), config.vocab_size)
        except ValueError as e:
            raise PretrainedError(f"{path}: {e}") from e
    return Opened(config, weights_lib.SafetensorsDirectory(path), tokenizer, source, files)


def pinned(path_or_hub_id: str, source: Mapping[str, Any]) -> str:
    """The same model at the commit that `source`, a config.json kept of it, is of: its branch may have moved on since."""
    local = pathlib.Path(path_or_hub_id).expanduser().exists() or not hub.is_address(path_or_hub_id)
    return path_or_hub_id if local or _REVISION not in source else hub.at_revision(path_or_hub_id, source[_REVISION])


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
    """The config.json of a directory; code that it names is not run, with a warning."""
    file = weights_lib.inside(directory, "config.json")
    source = weights_lib.read_json(file)
    if "auto_map" in source:
        warnings.warn(
            f"{file} names code of the model's own (auto_map), which is never run: the model is read as its model_type says, or refused.",
            stacklevel=3,
        )
    return source


def read_source(path_or_hub_id: str | pathlib.Path) -> dict[str, Any]:
    """The config.json of a model, whose weights need not be there, or what a .gguf file says; of the hub's models nothing else is downloaded.

    Raises:
      PretrainedError: there is none.
    """
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


def files_of(directory: pathlib.Path) -> dict[str, bytes]:
    """The tokenizer's files in a directory, see `Policy`; code that tokenizer_config.json names is left out.

    Raises:
      PretrainedError: one of them is a link that leads out of the directory.
    """
    paths = {name: weights_lib.inside(directory, name) for name in _FILES}
    files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    if b'"auto_map"' in files.get("tokenizer_config.json", b""):
        content = weights_lib.read_json(paths["tokenizer_config.json"])
        content.pop("auto_map", None)
        files["tokenizer_config.json"] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def find(path_or_hub_id: str | pathlib.Path) -> tuple[pathlib.Path, str]:
    """The directory or .gguf file, and the commit that it is of where it was downloaded from the hub (or found in its cache), else ""."""
    path = pathlib.Path(path_or_hub_id).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path, ""
    if path.exists():
        raise PretrainedError(f"{path} is neither a directory nor a .gguf file.")
    name = str(path_or_hub_id)
    if not hub.is_address(name):
        raise PretrainedError(
            f"There is no {name}: give a directory, a .gguf file, or an id of the hub such as Qwen/Qwen3-0.6B or Qwen/Qwen3-0.6B@REVISION."
        )
    wanted = ["config.json", "*.safetensors", "model.safetensors.index.json", *_FILES]
    try:
        # Some have their weights twice, in their maker's own format too.
        fetched = hub.fetch(name, wanted, ignored=["consolidated*"])
    except hub.HubError as e:
        raise PretrainedError(f"There is no directory {name}, and {e}") from e
    return fetched.directory, fetched.revision


def check_weights(opened: Opened, config: ModelConfig, kind: type[Policy] = Policy) -> None:
    """Refuses a model whose tensors are not those of `config`: missing, surplus or misshapen ones, or of the other kind of model.

    Raises:
      PretrainedError: with the names.
    """
    classifier = issubclass(kind, RewardModel)
    found = opened.source.get("architectures")
    architecture = str(found[0]) if isinstance(found, list) and found else ""
    if not classifier and architecture.endswith("ForSequenceClassification"):
        raise PretrainedError(f"{opened.weights.where} is a {architecture}: a reward model, read by load_reward_model.")
    if classifier and architecture.endswith("ForCausalLM"):
        raise PretrainedError(f"{opened.weights.where} is a {architecture}: a language model, read by load_pretrained.")
    weights_lib.check(opened.weights, _table(config, kind), tied=config.tied_embedding and not classifier)


def place_weights(opened: Opened, config: ModelConfig, mesh: jax.sharding.Mesh | None, kind: type[Policy] = Policy):
    """The parameters of an opened model in the dtype of `config`, on the mesh.

    Raises:
      PretrainedError: as `check_weights`, or the mesh does not divide them; nothing is placed then.
    """
    check_weights(opened, config, kind)
    classifier = issubclass(kind, RewardModel)
    module = reward_model_lib if classifier else decoder
    abstract = module.abstract_params(config)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)
    else:
        try:
            shardings = (reward_model_lib if classifier else sharding).param_shardings(config, mesh)
        except ValueError as e:
            raise PretrainedError(str(e)) from e
    return weights_lib.place(opened.weights, _table(config, kind), abstract, shardings)


def _load(path_or_hub_id, dtype: str, mesh, kind: type[Policy]):
    opened = open_model(path_or_hub_id)
    try:
        config = dataclasses.replace(opened.config, param_dtype=dtype, compute_dtype=dtype)
    except ValueError as e:
        raise PretrainedError(str(e)) from e
    params = place_weights(opened, config, mesh, kind)
    return kind(config, params, opened.tokenizer, opened.source, opened.files)


@functools.lru_cache(maxsize=32)
def _table(config: ModelConfig, kind: type[Policy]):
    module = reward_model_lib if issubclass(kind, RewardModel) else decoder
    return families.tensors_of(config, module.abstract_params(config))


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
