"""Tests tokenizers: round trips, special tokens, files in the Hugging Face layout, and their faults."""

import dataclasses
import json

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import tokenizers
from tokenizers import models

from jaxrl_reason import data

TEXTS = ["Ana has 12 apples.", "12 + 30 = 42\n#### 42", "How many apples does Ana have?"]
TOKENIZER = data.train_tokenizer(TEXTS, vocab_size=300)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids, skip_special=False) == text
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_the_pieces_of_any_ids_are_their_text(ids):
    pieces = TOKENIZER.pieces(ids)
    assert "".join(pieces) == TOKENIZER.completions([ids])[0] and len(pieces) == len(ids)


@given(st.text())
def test_pieces_hold_whole_characters(text):
    pieces = TOKENIZER.pieces([*TOKENIZER.encode(text), TOKENIZER.eos_ids[0]])
    assert "".join(pieces) == text and pieces[-1] == ""
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_pieces_of_a_long_row_of_broken_bytes():
    """The time is linear: 5,000 ids take a third of a second. Quadratic time would be half a minute."""
    broken = TOKENIZER.encode("日")[0]
    assert "".join(TOKENIZER.pieces([broken] * 5_000)) == "\ufffd" * 5_000
    assert TOKENIZER.pieces(TOKENIZER.encode("日é")) == ["", "", "日", "", "é"]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_batch_is_its_texts_one_by_one(texts):
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_digits_stay_single():
    tokens = [TOKENIZER.backend.id_to_token(i) for i in TOKENIZER.encode("12 + 30 = 42")]
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("123042")


def test_special_tokens_come_only_from_the_text_or_from_add_bos():
    assert TOKENIZER.encode("") == []
    assert not set(TOKENIZER.encode("Ana has 1")) & {TOKENIZER.pad_id, TOKENIZER.bos_id, *TOKENIZER.eos_ids}
    ids = TOKENIZER.encode("Ana<eos>")
    assert ids[-1] == TOKENIZER.eos_ids[0]
    assert TOKENIZER.decode(ids) == "Ana"
    assert TOKENIZER.decode(ids, skip_special=False) == "Ana<eos>"


def test_bos_is_added_exactly_once():
    ids = TOKENIZER.encode("Ana", add_bos=True)
    assert ids == [TOKENIZER.bos_id, *TOKENIZER.encode("Ana")]
    assert TOKENIZER.encode("<bos>Ana", add_bos=True) == ids


def test_training_is_deterministic_and_bounded(problems):
    texts = [row["question"] for row in problems["train"].read(range(1000))]
    first, second = data.train_tokenizer(texts, 350), data.train_tokenizer(texts, 350)
    assert first.backend.to_str() == second.backend.to_str()
    assert first.vocab_size == 350
    with pytest.raises(ValueError, match="vocab_size is 258, but .* at least 259"):
        data.train_tokenizer(texts, 258)


@pytest.mark.parametrize("eos_ids", [(2,), (2, 0, 5)])
def test_save_and_load_keep_everything(tmp_path, eos_ids):
    saved = data.Tokenizer(TOKENIZER.backend, eos_ids=eos_ids, pad_id=0, bos_id=1, chat_template="{{ messages }} é")
    saved.save(tmp_path / "new" / "directory")
    for path in (tmp_path / "new" / "directory", tmp_path / "new" / "directory" / "tokenizer.json"):
        loaded = data.load_tokenizer(path)
        for field in ("eos_ids", "pad_id", "bos_id", "chat_template", "vocab_size"):
            assert getattr(loaded, field) == getattr(saved, field), field
        assert loaded.backend.to_str() == saved.backend.to_str()


def test_saving_keeps_the_rest_of_a_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 7}')
    data.Tokenizer(TOKENIZER.backend, eos_ids=(2, 0), pad_id=0).save(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": [2, 0]}


@pytest.mark.parametrize(
    "files, expected",
    [
        (
            {"tokenizer_config.json": {"eos_token": "<eos>"}},
            {"eos_ids": (2,), "pad_id": 2, "bos_id": None, "chat_template": None},
        ),
        (
            {"tokenizer_config.json": {"eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}},
            {"eos_ids": (2,), "pad_id": 0},
        ),
        (
            {"special_tokens_map.json": {"eos_token": "<eos>", "bos_token": {"content": "<bos>"}}},
            {"eos_ids": (2,), "bos_id": 1},
        ),
        (
            {
                "special_tokens_map.json": {"bos_token": "<bos>"},
                "tokenizer_config.json": {"bos_token": None, "eos_token": "<eos>"},
            },
            {"bos_id": None},
        ),
        ({"generation_config.json": {"eos_token_id": 2}}, {"eos_ids": (2,)}),
        ({"config.json": {"eos_token_id": [2, 5]}}, {"eos_ids": (2, 5)}),
        ({"config.json": {"eos_token_id": 5}, "generation_config.json": {"eos_token_id": 2}}, {"eos_ids": (2,)}),
        (
            {"generation_config.json": {"eos_token_id": [0, 2, 5]}, "tokenizer_config.json": {"eos_token": "<eos>"}},
            {"eos_ids": (2, 0, 5)},
        ),
        ({"tokenizer_config.json": {"eos_token": "<eos>", "chat_template": "A"}}, {"chat_template": "A"}),
        (
            {
                "tokenizer_config.json": {
                    "eos_token": "<eos>",
                    "chat_template": [{"name": "tool", "template": "B"}, {"name": "default", "template": "A"}],
                }
            },
            {"chat_template": "A"},
        ),
    ],
)
def test_special_tokens_come_from_the_files_of_hugging_face(tmp_path, files, expected):
    TOKENIZER.backend.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = data.load_tokenizer(tmp_path)
    assert {field: getattr(loaded, field) for field in expected} == expected


@pytest.mark.parametrize(
    "unk, found", [("<pad>", "<pad>"), ({"content": "<bos>"}, "<bos>"), ("<unk>", None), (None, None)]
)
def test_an_unknown_token_is_kept_if_the_vocabulary_has_it(tmp_path, unk, found):
    loaded = data.load_tokenizer(files_of(tmp_path, unk_token=unk))
    assert loaded.unk_token == found
    loaded.save(tmp_path / "again")
    assert data.load_tokenizer(tmp_path / "again").unk_token == found


def test_a_chat_template_file_is_read(tmp_path):
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert data.load_tokenizer(tmp_path).chat_template == "{{ messages }}"


def test_truncation_and_padding_stored_in_the_file_are_not_applied(tmp_path):
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    data.Tokenizer(backend, eos_ids=(2,), pad_id=0).save(tmp_path)
    text = "How many apples does Ana have?"
    loaded = data.load_tokenizer(tmp_path)
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.encode_batch(["a", text])[0] == TOKENIZER.encode("a")


def test_a_vocabulary_with_holes_counts_up_to_its_largest_id():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<eos>": 9}, unk_token="a"))
    assert data.Tokenizer(backend, eos_ids=(9,), pad_id=9).vocab_size == 10


@pytest.mark.parametrize(
    "files, error, message",
    [
        ({}, FileNotFoundError, "No tokenizer at .*tokenizer.json"),
        (
            {"tokenizer.json": "not json"},
            ValueError,
            "tokenizer.json is not a tokenizer.json that the tokenizers library can read",
        ),
        (
            {"tokenizer.json": '{"a": 1}'},
            ValueError,
            "tokenizer.json is not a tokenizer.json that the tokenizers library can read",
        ),
        (
            {"tokenizer.json": None},
            ValueError,
            'No end token is known for .*tokenizer.json: put a tokenizer_config.json with an "eos_token"',
        ),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, ValueError, "tokenizer_config.json is not JSON"),
        (
            {"tokenizer.json": None, "tokenizer_config.json": "[]"},
            ValueError,
            "tokenizer_config.json holds a JSON list",
        ),
        (
            {"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": "<end>"}'},
            ValueError,
            "names eos_token '<end>', which is not in the vocabulary",
        ),
        (
            {"tokenizer.json": None, "generation_config.json": '{"eos_token_id": 99999}'},
            ValueError,
            "eos_ids holds 99999, which is not in",
        ),
    ],
)
def test_faults_of_files_raise_a_sentence(tmp_path, files, error, message):
    for name, content in files.items():
        (tmp_path / name).write_text(TOKENIZER.backend.to_str() if content is None else content)
    with pytest.raises(error, match=message):
        data.load_tokenizer(tmp_path)


def test_impossible_requests_raise():
    with pytest.raises(ValueError, match="eos_ids is empty"):
        data.Tokenizer(TOKENIZER.backend, eos_ids=(), pad_id=0)
    with pytest.raises(ValueError, match="set add_bos to False"):
        data.Tokenizer(TOKENIZER.backend, eos_ids=(2,), pad_id=0).encode("a", add_bos=True)


def test_added_tokens_beyond_the_model_are_left_out():
    """Gemma 3's image token is an example. Its text models have no embedding for it."""
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    size = TOKENIZER.vocab_size
    backend.add_special_tokens(["<image>"])
    bigger = dataclasses.replace(TOKENIZER, backend=backend)
    assert bigger.vocab_size == size + 1 and bigger.encode("<image>") == [size]
    found = data.fitted(bigger, size)
    assert found.vocab_size == size and max(found.encode("a <image> b")) < size
    assert found.decode(found.encode("a <image> b")) == "a <image> b" and found.encode("ab") == TOKENIZER.encode("ab")
    assert data.fitted(bigger, size + 1) is bigger
    with pytest.raises(ValueError, match=f"The tokenizer has {size + 1} tokens, and the model {size - 1}"):
        data.fitted(bigger, size - 1)
    with pytest.raises(ValueError, match="eos_ids holds"):
        data.fitted(dataclasses.replace(bigger, eos_ids=(size,)), size)


def files_of(tmp_path, post_bos=False, added=None, **config):
    """Writes a tokenizer.json, which may begin texts with <bos>, and a tokenizer_config.json."""
    directory = tmp_path / "model"
    directory.mkdir(exist_ok=True)
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    if post_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    backend.save(str(directory / "tokenizer.json"))
    defaults = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    content = {name: value for name, value in (defaults | config).items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    if added is not None:
        (directory / "added_tokens.json").write_text(json.dumps(added))
    return directory


@pytest.mark.parametrize(
    "post_bos, config, expected",
    [
        (False, {}, False),
        (True, {}, True),
        (False, {"add_bos_token": True}, True),
        (True, {"add_bos_token": True}, True),
        (False, {"add_bos_token": False}, False),
        (True, {"add_bos_token": False}, True),  # as in transformers 5
        (False, {"add_bos_token": True, "bos_token": None}, False),  # there is no token to add
    ],
)
def test_add_bos_token_and_tokenizer_json_decide_how_prompts_begin(tmp_path, post_bos, config, expected):
    found = data.load_tokenizer(files_of(tmp_path, post_bos, **config))
    assert found.adds_bos is expected
    found.save(tmp_path / "again")
    assert data.load_tokenizer(tmp_path / "again").adds_bos is expected


def test_add_bos_token_is_true_or_false(tmp_path):
    with pytest.raises(ValueError, match="The add_bos_token of .* is 'yes'; it must be true or false"):
        data.load_tokenizer(files_of(tmp_path, add_bos_token="yes"))


SIZE = TOKENIZER.vocab_size


@pytest.mark.parametrize(
    "added, config, pad, size",
    [
        ({"[PAD]": SIZE}, {}, SIZE, SIZE + 1),
        ({"<x>": SIZE, "[PAD]": SIZE + 1}, {}, SIZE + 1, SIZE + 2),
        (None, {"added_tokens_decoder": {str(SIZE): {"content": "[PAD]", "special": True}}}, SIZE, SIZE + 1),
        ({"[PAD]": SIZE + 7}, {}, 2, SIZE),  # no tokenizer has this id; the end token pads
        ({"[PAD]": SIZE}, {"pad_token": {"content": "[PAD]"}}, SIZE, SIZE + 1),
    ],
)
def test_a_padding_token_can_stand_in_added_tokens_alone(tmp_path, added, config, pad, size):
    found = data.load_tokenizer(files_of(tmp_path, added=added, **({"pad_token": "[PAD]"} | config)))
    assert (found.pad_id, found.vocab_size) == (pad, size)
    assert found.eos_ids == (2,)
    smaller = data.fitted(found, SIZE)  # the model's embedding has no row for it
    assert (smaller.pad_id, smaller.vocab_size) == (2, SIZE)
    assert smaller.encode("Ana has 1") == TOKENIZER.encode("Ana has 1")


def test_added_tokens_keep_how_they_are_found(tmp_path):
    flags = dict(special=False, lstrip=True, rstrip=False, normalized=False, single_word=True)
    decoder = {str(SIZE): {"content": "<tool>", **flags}, str(SIZE + 1): {"content": "<think>", "special": False}}
    decoder[str(SIZE + 2)] = {"content": "<image>", "special": True}
    found = data.load_tokenizer(files_of(tmp_path, added={"<tool>": SIZE}, added_tokens_decoder=decoder))
    ids = found.encode("Ana <tool> a<tool><think><image>")
    assert ids.count(SIZE) == 1 and ids[-2:] == [SIZE + 1, SIZE + 2]  # <tool> is no part of a word, and takes the blank
    assert found.decode(ids[:2] + ids[-2:]) == found.decode(ids[:2]) + "<think>"  # ordinary tokens are shown
    assert ids[ids.index(SIZE) - 1] == TOKENIZER.encode("Ana")[-1]
    kept = found.backend.get_added_tokens_decoder()[SIZE]
    assert {name: getattr(kept, name) for name in flags} == flags
    with pytest.raises(ValueError, match="their flags .special, lstrip, .* must be true or false"):
        decoder[str(SIZE)]["lstrip"] = "yes"
        data.load_tokenizer(files_of(tmp_path, added_tokens_decoder=decoder))


def test_an_end_token_of_added_tokens_ends_completions(tmp_path):
    found = data.load_tokenizer(files_of(tmp_path, added={"<|im_end|>": SIZE}, eos_token="<|im_end|>"))
    assert found.eos_ids == (SIZE,) and found.encode("Ana<|im_end|>")[-1] == SIZE
    assert found.decode([SIZE]) == ""
    with pytest.raises(ValueError, match="names eos_token '<|im_end|>', which is not in the vocabulary"):
        data.load_tokenizer(files_of(tmp_path, added={"<|im_end|>": SIZE + 5}, eos_token="<|im_end|>"))
    with pytest.raises(ValueError, match="The added tokens of .* must map texts to whole numbers"):
        data.load_tokenizer(files_of(tmp_path, added={"<|im_end|>": "first"}))


def test_completions_have_all_but_end_and_padding_tokens():
    """Texts show the special tokens of reasoning and turns, unless the tokens end or pad a text."""
    tokenizer = data.train_tokenizer([], vocab_size=259)
    tokenizer.backend.add_special_tokens(["<think>", "</think>", "<turn>"])
    ends = dataclasses.replace(tokenizer, eos_ids=(2, tokenizer.backend.token_to_id("<turn>")))
    rows = [ends.encode(text) for text in ("<think>a</think>b<eos>", "<bos>c<turn>", "d<pad>e", "<eos>", "ü\n")] + [[]]
    assert ends.completions(rows) == ["<think>a</think>b", "<bos>c", "de", "", "ü\n", ""]
    assert ends.completions(rows, skip_special=True) == ["ab", "c", "de", "", "ü\n", ""]
    assert tokenizer.completions(rows[1:2]) == ["<bos>c<turn>"]  # <turn> is no end token here
    words = dataclasses.replace(tokenizer, eos_ids=tuple(tokenizer.encode("\n")))  # an end token of ordinary text
    assert words.completions([words.encode("18\n")]) == ["18"]
