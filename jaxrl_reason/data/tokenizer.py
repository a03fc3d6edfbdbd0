"""Tokenizers: a frozen wrapper over the `tokenizers` library with the end, begin and padding tokens."""

from collections.abc import Iterable, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxrl_reason.data import hub

# Files that `load_tokenizer` reads next to a tokenizer.json.
_CONFIG_FILES = (
    *("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json", "generation_config.json"),
    "config.json",
)
_CHAT_FILE = "chat_template.jinja"
# What added_tokens_decoder of tokenizer_config.json says of a token.
_TOKEN_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Converts text to ids and back. Ids are Python ints. Special tokens come only from the text or from `add_bos`."""

    backend: tokenizers.Tokenizer
    eos_ids: tuple[int, ...]  # the ids that end a completion, at least one; supervised completions end with the first
    pad_id: int  # the id at unused positions; it may equal an end token: masks are never inferred from ids
    bos_id: int | None = None  # the id that begins a sequence, if the vocabulary has one
    chat_template: str | None = None  # the Jinja text that came with the tokenizer
    adds_bos: bool = False  # whether plain prompts begin with the begin token, as the model's files ask for
    unk_token: str | None = None  # the text of the token for unknown characters, which chat templates may write

    def __post_init__(self) -> None:
        if not self.eos_ids:
            raise ValueError("A tokenizer needs at least one end token: eos_ids is empty.")
        special = [*(("eos_ids", i) for i in self.eos_ids), ("pad_id", self.pad_id)]
        special += [] if self.bos_id is None else [("bos_id", self.bos_id)]
        for field, token_id in special:
            if token_id < 0 or self.backend.id_to_token(token_id) is None:
                vocabulary = f"the tokenizer's vocabulary of {self.vocab_size} tokens"
                raise ValueError(f"{field} holds {token_id}, which is not in {vocabulary}.")

    @property
    def vocab_size(self) -> int:
        """The largest id plus one, added tokens included: the number of rows that an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def spelled(self, token_id: int) -> str | None:
        """Returns the text of a token; None if there is no such token."""
        return self.backend.id_to_token(token_id)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Returns the ids of a text with its special tokens; `add_bos` adds the begin token, unless the text has it."""
        return self.encode_batch([text], add_bos)[0]

    def encode_batch(self, texts: Sequence[str], add_bos: bool = False) -> list[list[int]]:
        """Encodes many texts, on all cores. Raises ValueError for `add_bos` if the tokenizer has no begin token."""
        ids = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        if not add_bos:
            return ids
        bos = self.bos_id
        if bos is None:
            raise ValueError("This tokenizer has no begin token (bos_id is None): set add_bos to False.")
        return [row if row[:1] == [bos] else [bos, *row] for row in ids]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Returns the text of `ids`, without special tokens, or with them if `skip_special` is False."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_batch(self, rows: Sequence[Sequence[int]], skip_special: bool = True) -> list[str]:
        """Decodes many rows, on all cores."""
        return self.backend.decode_batch([list(row) for row in rows], skip_special_tokens=skip_special)

    def completions(self, rows: Sequence[Sequence[int]], skip_special: bool = False) -> list[str]:
        """Returns the texts of sampled ids as they were sampled, without end and padding tokens.

        `skip_special` leaves out all other special tokens too, such as a `<think>` that is one.
        """
        unseen = {*self.eos_ids, self.pad_id}
        return self.decode_batch([[i for i in row if i not in unseen] for row in rows], skip_special)

    def pieces(self, ids: Sequence[int], skip_special: bool = False) -> list[str]:
        """Returns the text that each sampled id adds to that of the ids before it; "" for end and padding tokens.

        Joined they are the text of `completions`. The last id of a character of several ids has the whole character.
        """
        unseen, out = {*self.eos_ids, self.pad_id}, [""] * len(ids)
        seen = [i for i in range(len(ids)) if ids[i] not in unseen]
        text = lambda begin, end: self.decode([ids[i] for i in seen[begin:end]], skip_special)
        begin = end = 0  # the ids whose text was added last: the first token of a text can lose its space
        for n in range(1, len(seen) + 1):
            before, now = text(begin, end), text(begin, n)
            # A character may go on, but no character has 32 ids: a long row of invalid bytes costs no square of its length.
            if n == len(seen) or n - end == 32 or not now.endswith("\ufffd"):
                out[seen[n - 1]] = now[len(os.path.commonprefix([before, now])) :]
                begin, end = end, n
        return out

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and, for several end tokens, generation_config.json."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.backend.id_to_token(self.eos_ids[0]),
            "bos_token": None if self.bos_id is None else self.backend.id_to_token(self.bos_id),
            "pad_token": self.backend.id_to_token(self.pad_id),
            "add_bos_token": self.adds_bos,
            "clean_up_tokenization_spaces": False,
        }
        if self.unk_token is not None:
            config["unk_token"] = self.unk_token
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _write_json(directory / "tokenizer_config.json", config)
        if len(self.eos_ids) > 1:  # tokenizer_config.json can hold only one
            path = directory / "generation_config.json"
            _write_json(path, _read_json(path) | {"eos_token_id": list(self.eos_ids)})


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Reads a tokenizer from a directory in the Hugging Face layout, or from a tokenizer.json and the files next to it.

    Begin, end and padding tokens come from tokenizer_config.json, else from special_tokens_map.json. Tokens that only
    added_tokens.json or tokenizer_config.json have are added. generation_config.json, else the model's config.json, may
    add end tokens. Without a padding token, eos_ids[0] pads. Prompts begin with the begin token if tokenizer.json adds it,
    as in transformers 5 whatever add_bos_token of tokenizer_config.json says, or if add_bos_token is true.
    Raises FileNotFoundError without a tokenizer.json, and ValueError if a file is damaged or a link that leads out of
    the directory, or if no end token is known.
    """
    path = pathlib.Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        need = "a directory that contains a tokenizer.json, or the path of such a file"
        raise FileNotFoundError(f"No tokenizer at {file}: give {need}.")
    if path.is_dir():
        for name in (file.name, *_CONFIG_FILES, _CHAT_FILE):
            hub.inside(path, name)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a tokenizer.json that the tokenizers library can read: {error}.") from error
    backend.no_truncation()  # the file may store both, and they change ids
    backend.no_padding()
    config = _read_json(file.parent / "special_tokens_map.json") | _read_json(file.parent / "tokenizer_config.json")
    added = _added_tokens(file.parent, config)
    _add(backend, added)
    bos, eos = (_token_id(backend, x, config.get(f"{x}_token"), file.parent) for x in ("bos", "eos"))
    pad_token = _content(config.get("pad_token"))
    # Padding is never read, so the end token stands in for a padding token beyond the vocabulary.
    beyond = isinstance(pad_token, str) and pad_token in added and backend.token_to_id(pad_token) is None
    pad = None if beyond else _token_id(backend, "pad", pad_token, file.parent)
    more = _read_json(file.parent / "generation_config.json").get("eos_token_id")
    more = _read_json(file.parent / "config.json").get("eos_token_id") if more is None else more
    more = more if isinstance(more, list) else [more]
    if any(i is not None and type(i) is not int for i in more):
        raise ValueError(f"The eos_token_id of {file.parent} is {more}; it must be a number or a list of numbers.")
    eos_ids = tuple(dict.fromkeys(i for i in [eos, *more] if i is not None))
    if not eos_ids:
        remedy = 'put a tokenizer_config.json with an "eos_token" next to it'
        more_remedy = '(or a generation_config.json with an "eos_token_id")'
        raise ValueError(f"No end token is known for {file}: {remedy} {more_remedy}.")
    pad_id = eos_ids[0] if pad is None else pad
    adds_bos = config.get("add_bos_token")
    if adds_bos not in (None, True, False):
        raise ValueError(f"The add_bos_token of {file.parent} is {adds_bos!r}; it must be true or false.")
    adds_bos = bos is not None and (bool(adds_bos) or backend.encode("a").ids[:1] == [bos])
    unk = _content(config.get("unk_token"))
    unk = unk if isinstance(unk, str) and backend.token_to_id(unk) is not None else None
    return Tokenizer(backend, eos_ids, pad_id, bos, _chat_template(file.parent, config), adds_bos, unk)


def fitted(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """Returns the tokenizer without added tokens that an embedding of `size` rows lacks, such as Gemma 3's image token.

    The end token replaces such a padding token, which is never read. Raises ValueError if the vocabulary itself, or the
    begin or end token, exceeds the model's.
    """
    if tokenizer.vocab_size <= size:
        return tokenizer
    content = json.loads(tokenizer.backend.to_str())
    content["added_tokens"] = [token for token in content.get("added_tokens", []) if token["id"] < size]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    if max(backend.get_vocab(with_added_tokens=True).values()) >= size:
        raise ValueError(f"The tokenizer has {tokenizer.vocab_size} tokens, and the model {size}.")
    pad_id = tokenizer.pad_id if tokenizer.pad_id < size else tokenizer.eos_ids[0]
    return dataclasses.replace(tokenizer, backend=backend, pad_id=pad_id)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Tokenizer:
    """Trains a byte-level BPE tokenizer that splits numbers into digits and encodes any text.

    Training is deterministic; two thousand problems take a fraction of a second. `vocab_size` is an upper bound, which
    a few texts may not fill. Raises ValueError if it is below 259: the bytes, `<pad>`, `<bos>`, `<eos>`.
    """
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + len(special)
    if vocab_size < least:
        need = f"256 bytes and {len(special)} special tokens need at least {least}"
        raise ValueError(f"vocab_size is {vocab_size}, but {need}.")
    backend = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, eos_ids=(2,), pad_id=0, bos_id=1)


def _added_tokens(directory: pathlib.Path, config: dict) -> dict[str, tuple[int, tokenizers.AddedToken]]:
    """Returns the tokens in added_tokens.json, and in the added_tokens_decoder of tokenizer_config.json, with their ids.

    The second file says of each token whether it is special, and how it is found in a text; tokens of the first are special.
    """
    found, plain = {}, _read_json(directory / "added_tokens.json")
    try:
        for token, token_id in plain.items():
            if type(token_id) is not int:
                raise TypeError
            found[token] = token_id, tokenizers.AddedToken(token, special=True)
        for token_id, token in (config.get("added_tokens_decoder") or {}).items():
            known = token if isinstance(token, dict) else {}
            flags = {name: known[name] for name in _TOKEN_FLAGS if known.get(name) is not None}
            added = tokenizers.AddedToken(_content(token), **flags)
            found[added.content] = int(token_id), added
    except (TypeError, ValueError, AttributeError) as error:
        fault = f"The added tokens of {directory} must map texts to whole numbers"
        raise ValueError(f"{fault}, and their flags ({', '.join(_TOKEN_FLAGS)}) must be true or false.") from error
    return found


def _add(backend: tokenizers.Tokenizer, tokens: dict[str, tuple[int, tokenizers.AddedToken]]) -> None:
    """Adds tokens that a tokenizer lacks, if their ids continue its own. Others stay unknown to it."""
    for token, (token_id, added) in sorted(tokens.items(), key=lambda item: item[1][0]):
        if backend.token_to_id(token) is None and token_id == backend.get_vocab_size(with_added_tokens=True):
            backend.add_tokens([added])
            if backend.token_to_id(token) != token_id:
                raise ValueError(
                    f"The added token {token!r} has the id {token_id}, which the tokenizer cannot give it."
                )


def _content(token: Any) -> Any:
    """Returns the text of a token that a configuration spells as a string or as {"content": string}."""
    return token.get("content") if isinstance(token, dict) else token


def _token_id(backend: tokenizers.Tokenizer, name: str, token: Any, directory: pathlib.Path) -> int | None:
    """Returns the id of a token of a configuration, see `_content`."""
    token = _content(token)
    if token is None:
        return None
    if not isinstance(token, str):
        raise ValueError(f"The configuration in {directory} has {name}_token {token!r}; it must be a text.")
    token_id = backend.token_to_id(token)
    if token_id is None:
        fault = f"{name}_token {token!r}, which is not in the vocabulary of its tokenizer.json"
        raise ValueError(f"The configuration in {directory} names {fault}.")
    return token_id


def _chat_template(directory: pathlib.Path, config: dict) -> str | None:
    """Reads chat_template.jinja, else tokenizer_config.json, whose template may be a list of named templates."""
    file = directory / _CHAT_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"The chat_template in {directory} is a {type(template).__name__}; it must be a text.")
    return template


def _read_json(path: pathlib.Path) -> dict:
    """Returns the object in a JSON file, or {} if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; it has to hold an object.")
    return content


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
