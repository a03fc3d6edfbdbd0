"""Pretrained models, read and written: policies, reward models and, in the layout of PEFT, adapters.

Nothing in a directory is ever executed. `transformers`, vLLM and llama.cpp's converter load the written directories.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped
import numpy as np

from jaxrl_reason.data import hub
from jaxrl_reason.data.tokenizer import Tokenizer
from jaxrl_reason.models import decoder, lora
from jaxrl_reason.models import reward_model as reward_model_lib
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.decoding import texts
from jaxrl_reason.models.formats import families
from jaxrl_reason.models.formats import weights as weights_lib
from jaxrl_reason.models.formats.source import ADAPTED, Address, open_model, REVISION, TEXTS
from jaxrl_reason.models.formats.tensors import Opened, PretrainedError, tensors_of

Tokens = Int[Array | np.ndarray, "B S"]
Mask = Shaped[Array | np.ndarray, "B S"]


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A language model."""

    config: ModelConfig
    params: decoder.Params
    tokenizer: Tokenizer | None = None  # None: the directory has none
    # The original config.json, with the commit of a model of the hub; empty for a model of our own.
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # original files of the tokenizer, by name

    def apply(self, params: decoder.Params, tokens: Tokens, mask: Mask | None = None) -> Float[Array, "B S V"]:
        """Computes logits, see `models.apply`. Pure, and compiled by jit."""
        return _logits(self.config, params, tokens, mask)

    def generate(
        self,
        prompts: Sequence[texts.Prompt],
        samples: int = 4,
        *,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        chat: bool | None = None,
        batch_size: int | None = None,
    ) -> list[list[str]]:
        """Samples completions of prompts, on the mesh or the device of the weights.

        The random numbers are those of an evaluation with this seed, by the positions of the prompts. So a sample does not
        depend on the batch size. Texts are without end tokens; other special tokens stay.

        Args:
          prompts: texts, which are encoded as they are; or conversations, lists of {"role": ..., "content": ...}, which the
            chat template of the model renders.
          samples: completions per prompt.
          max_completion_length: the largest number of tokens per completion.
          temperature: 0 is greedy.
          top_p, top_k: truncate the distribution, after the temperature and top-k first; 1.0 and 0 keep all tokens.
          chat: True: a text is the user's turn of a conversation; False: conversations are refused.
          batch_size: prompts at once; None: as many as have 64 completions.

        Returns:
          A list of `samples` texts per prompt.

        Raises ValueError for an argument that does not fit, and PretrainedError without a tokenizer.
        """
        if self.tokenizer is None:
            raise PretrainedError(
                "This model has no tokenizer, so prompts cannot be read: put a tokenizer.json into its directory."
            )
        return texts.sample_texts(
            self.config,
            self.params,
            self.tokenizer,
            prompts,
            samples,
            max_completion_length=max_completion_length,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            chat=chat,
            batch_size=batch_size,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel(Policy):
    """A sequence classifier with one label; `params` are {"decoder": ..., "score": f32[D]}. See `Policy`."""

    def apply(self, params: decoder.Params, tokens: Tokens, mask: Mask | None = None) -> Float[Array, " B"]:
        """Computes scores, see `reward_model.scores`. Pure, and compiled by jit.

        They are read at the last real token. If the model's config.json has a pad_token_id, they are read at the last
        real token that is not this one, as in `transformers`: at the token before, if an end token pads.
        """
        return _scores(self.config, params, tokens, mask, pad_id_of(self.source))

    def generate(self, *args: Any, **options: Any) -> list[list[str]]:
        """Raises PretrainedError."""
        raise PretrainedError(
            "A reward model scores texts and samples none: load a language model with load_pretrained."
        )


_Kind = TypeVar("_Kind", bound=Policy)
_logits = jax.jit(decoder.apply, static_argnums=0)
_scores = jax.jit(reward_model_lib.scores, static_argnums=(0, 4))


def pad_id_of(source: Mapping[str, Any]) -> int | None:
    """Returns the pad_token_id of a config.json, at which a reward model reads no score; None without one."""
    found = source.get("pad_token_id")
    return found if type(found) is int else None


def load_pretrained(path_or_hub_id: Address, dtype: str = "float32", mesh: Mesh | None = None) -> Policy:
    """Reads a language model. Raises PretrainedError if that is not possible; nothing is placed on a device then.

    Args:
      path_or_hub_id: a directory with config.json, safetensors and tokenizer.json; a PEFT directory with adapters; the id of a model on the Hugging Face hub
        ("Qwen/Qwen3-0.6B", or with a branch, tag or commit "Qwen/Qwen3-0.6B@c1899de"); or a .gguf file.
      dtype: of the weights and of the operands of products, "float32" or "bfloat16".
      mesh: the mesh that the weights are placed on, see `models.sharding`; None: the first device.
    """
    return _load(path_or_hub_id, dtype, mesh, Policy)


def load_reward_model(path_or_hub_id: Address, dtype: str = "float32", mesh: Mesh | None = None) -> RewardModel:
    """Reads a sequence classifier with one label, such as Qwen2ForSequenceClassification; see `load_pretrained`."""
    return _load(path_or_hub_id, dtype, mesh, RewardModel)


def _load(path_or_hub_id: Address, dtype: str, mesh: Mesh | None, kind: type[_Kind]) -> _Kind:
    opened = open_model(path_or_hub_id)
    try:
        config = dataclasses.replace(opened.config, param_dtype=dtype, compute_dtype=dtype)
    except ValueError as e:
        raise PretrainedError(str(e)) from e
    params = place_weights(opened, config, mesh, kind)
    return kind(config, params, opened.tokenizer, opened.source, opened.files)


def check_weights(opened: Opened, config: ModelConfig, kind: type[Policy] = Policy) -> None:
    """Raises PretrainedError if an opened model lacks tensors of `config`, has others, or is not of the `kind`."""
    classifier = issubclass(kind, RewardModel)
    found = opened.source.get("architectures")
    architecture = str(found[0]) if isinstance(found, list) and found else ""
    if not classifier and architecture.endswith("ForSequenceClassification"):
        raise PretrainedError(f"{opened.weights.where} is a {architecture}: a reward model, read by load_reward_model.")
    if classifier and architecture.endswith("ForCausalLM"):
        raise PretrainedError(f"{opened.weights.where} is a {architecture}: a language model, read by load_pretrained.")
    weights_lib.check(opened.weights, _table(config, classifier), tied=config.tied_embedding and not classifier)


def place_weights(
    opened: Opened, config: ModelConfig, mesh: Mesh | None, kind: type[Policy] = Policy
) -> decoder.Params:
    """Reads the weights of an opened model onto a mesh, or the first device, in the dtype of `config`.

    Raises PretrainedError if `check_weights` raises or the mesh does not divide the weights; nothing is placed then.
    """
    check_weights(opened, config, kind)
    classifier = issubclass(kind, RewardModel)
    abstract = _module(classifier).abstract_params(config)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)
    else:
        try:
            shardings = _module(classifier).param_shardings(config, mesh)
        except ValueError as e:
            raise PretrainedError(str(e)) from e
    return weights_lib.place(opened.weights, _table(config, classifier), abstract, shardings)


def _module(classifier: bool):
    return reward_model_lib if classifier else decoder


@functools.lru_cache(maxsize=32)
def _table(config: ModelConfig, classifier: bool) -> dict[str, Any]:
    return tensors_of(config, _module(classifier).abstract_params(config))


def save_pretrained(directory: str | pathlib.Path, policy: Policy, *, max_shard_bytes: int = 4 * 2**30) -> None:
    """Writes config.json, safetensors, the tokenizer's files and generation_config.json; all of them or nothing.

    A tensor larger than `max_shard_bytes` has a file of its own. Raises PretrainedError if the directory is not empty, the policy has
    adapters, or no family describes the decoder.
    """
    if policy.config.lora_rank:
        raise PretrainedError(
            "This policy has adapters: merge them first (models.lora.merge), or write them with models.save_adapters."
        )
    content = config_json(policy)
    with _complete_or_absent(directory) as scratch:
        _write_json(scratch / "config.json", content)
        table = _table(policy.config, isinstance(policy, RewardModel))
        weights_lib.write(scratch, policy.params, table, max_shard_bytes)
        _write_tokenizer(scratch, policy)
        t = policy.tokenizer
        if isinstance(policy, RewardModel) and t and t.pad_id in t.eos_ids and content["pad_token_id"] is None:
            _remove_pad_token(scratch)
        ids = {name: content[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in content}
        if type(policy) is Policy and not (scratch / "generation_config.json").exists():
            _write_json(scratch / "generation_config.json", {"_from_model_config": True} | ids)


def save_adapters(directory: str | pathlib.Path, policy: Policy, base_model: str) -> None:
    """Writes the adapters of a policy in the layout of PEFT, and the tokenizer's files; all of them or nothing.

    PEFT adds the adapters to `base_model`, a directory or an id of the hub. A directory is written as an absolute path, an id with the
    commit that the policy began with.
    Raises PretrainedError if the directory is not empty, the policy has no adapters, or it began with adapters: PEFT needs a
    base model.
    """
    if ADAPTED in policy.source:
        fault = f"This policy began with adapters on {policy.source[ADAPTED]}, and PEFT needs a base model"
        raise PretrainedError(f"{fault}: write merged weights instead.")
    if not policy.config.lora_rank:
        raise PretrainedError("This policy has no adapters (lora_rank is 0): write it with models.save_pretrained.")
    revision, path = policy.source.get(REVISION), pathlib.Path(base_model).expanduser()
    if revision:
        base_model = hub.name_of(base_model)
    elif path.exists() or not hub.is_address(base_model):
        base_model = str(path.absolute())
    table = _table(lora.base_of(policy.config), False)["layers"]
    names = policy.config.lora_projections
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": policy.config.lora_rank,
        "lora_alpha": policy.config.lora_alpha,
        "target_modules": [table[name].names[0].split(".")[-2] for name in names],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {}
    for name in names:
        for side, theirs in (("a", "lora_A"), ("b", "lora_B")):
            stacked = np.asarray(policy.params["layers"][f"{name}_{side}"])
            for layer, matrix in zip(table[name].names, stacked):
                module = layer.removesuffix(".weight")
                tensors[f"base_model.model.{module}.{theirs}.weight"] = np.ascontiguousarray(matrix.T)
    with _complete_or_absent(directory) as scratch:
        weights_lib.save_tensors(scratch / "adapter_model.safetensors", tensors)
        _write_json(scratch / "adapter_config.json", content)
        _write_tokenizer(scratch, policy)


def config_json(policy: Policy) -> dict[str, Any]:
    """Returns the content of config.json for a model: the original if it still describes the decoder, else that of a family.

    The dtype of the weights is updated. Names of code are removed. `transformers` reads a score at the last token that is not
    pad_token_id. So a reward model whose scores are read at an end token has null there, even if its tokenizer pads with
    this token: `transformers` then scores single texts as here, and refuses padded batches.
    """
    classifier = isinstance(policy, RewardModel)
    found = {name: x for name, x in policy.source.items() if name not in (REVISION, ADAPTED, "auto_map")}
    free: dict[str, Any] = {name: getattr(policy.config, name) for name in families.UNWRITTEN}
    try:
        same = bool(found) and dataclasses.replace(families.read_config(found), **free) == policy.config
    except PretrainedError:
        same = False
    t = policy.tokenizer
    ids: dict[str, Any] = {}
    if t is not None:
        eos = list(t.eos_ids) if len(t.eos_ids) > 1 else t.eos_ids[0]
        ids = {"bos_token_id": t.bos_id, "eos_token_id": eos, "pad_token_id": t.pad_id}
    if classifier:
        read = pad_id_of(policy.source)
        ids["pad_token_id"] = t.pad_id if read is None and t is not None and t.pad_id not in t.eos_ids else read
    if same:
        found.pop("dtype", None)
        return ids | found | {"torch_dtype": policy.config.param_dtype}
    out = families.write_config(policy.config, classifier)
    out["max_position_embeddings"] = found.get("max_position_embeddings", 4096)
    if classifier:
        out |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        out |= {TEXTS: found[TEXTS]} if TEXTS in found else {}
    return out | ids


@contextlib.contextmanager
def _complete_or_absent(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a scratch directory to write into, and renames it to `path` at the end; removes it if the caller raises."""
    directory = pathlib.Path(path).expanduser()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PretrainedError(f"{directory} is there already and not empty; choose another directory.")
    directory = directory.resolve()
    scratch = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # from an export that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if directory.exists():
            directory.rmdir()
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_tokenizer(directory: pathlib.Path, policy: Policy) -> None:
    """Writes the original files of the tokenizer, or the files of a tokenizer of our own."""
    if policy.tokenizer is not None and "tokenizer.json" not in policy.files:
        policy.tokenizer.save(directory)
    for name, content in policy.files.items():
        (directory / name).write_bytes(content)


def _remove_pad_token(directory: pathlib.Path) -> None:
    """Removes the padding token from the files of a tokenizer: `transformers` would pad texts with it."""
    for path in (directory / "tokenizer_config.json", directory / "special_tokens_map.json"):
        content = weights_lib.read_json(path) if path.is_file() else {}
        if content.pop("pad_token", None) is not None:
            _write_json(path, content)


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
