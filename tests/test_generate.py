"""Tests the generate command: prompts, files, sessions, streams, control characters and refusals."""

import dataclasses
import io
import json
import types

import jax
import jax.numpy as jnp
import pytest

from helpers import reference_decoder as reference
from jaxrl_reason import data, generate, models
from jaxrl_reason.config import ConfigError
from jaxrl_reason.data.tables import TargetScaler
from jaxrl_reason.runs.terminal import visible
from jaxrl_reason.tasks import policies, sampling
from jaxrl_reason.tasks.regression.prediction import Prediction

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    tokenizer = dataclasses.replace(data.train_tokenizer(["3 + 4 = 7"], 262), chat_template=CHAT)
    config = models.ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, tied_embedding=False
    )
    params = jax.tree.map(jnp.asarray, reference.random_params(config, seed=3, scale=0.3))
    directory = tmp_path_factory.mktemp("models") / "model"
    models.save_pretrained(directory, models.Policy(config, params, tokenizer))
    return directory


def run(policy, *flags):
    return generate.main([f"--model={policy}", "--max_completion_length=8", *flags])


def test_a_folder_in_the_directory_of_a_model_leaves_the_model_as_it_is(policy):
    before = policies.open_policy(str(policy), {}).changed
    assert before == max(path.stat().st_mtime for path in policy.iterdir())
    (policy / "evaluation").mkdir()
    (policy / "evaluation" / "evaluation.json").write_text("{}")
    assert policies.open_policy(str(policy), {}).changed == before


def test_prompts_give_the_texts_of_policy_generate(policy, tmp_path, capsys):
    sampling_flags = ["--samples=2", "--top_p=0.9", "--top_k=50", "--temperature=0.8", "--seed=5"]
    out = tmp_path / "out.jsonl"
    assert run(policy, "--prompt=3 + 4 = ?", "--prompt=2", f"--out={out}", *sampling_flags) == 0
    options = dict(top_p=0.9, top_k=50, temperature=0.8, seed=5, max_completion_length=8, chat=True)
    expected = models.load_pretrained(policy).generate(["3 + 4 = ?", "2"], 2, **options)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [[s["text"] for s in line["samples"]] for line in lines] == expected
    assert [line["prompt"] for line in lines] == ["3 + 4 = ?", "2"]
    printed = capsys.readouterr().out
    assert all(visible(text) in printed for group in expected for text in group)
    (tmp_path / "prompts.jsonl").write_text('"3 + 4 = ?"\n{"question": [{"role": "user", "content": "2"}]}\n')
    assert run(policy, f"--prompts={tmp_path / 'prompts.jsonl'}", *sampling_flags) == 0
    assert capsys.readouterr().out.count("log-probability") == 4 and all(
        visible(text) in printed for group in expected for text in group
    )


def test_a_system_prompt_needs_a_chat_template_and_nothing_else(policy, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(policy, "--prompt=2", "--system=Be brief.", "--temperature=0", f"--out={out}") == 0
    model, turns = models.load_pretrained(policy), [("system", "Be brief."), ("user", "2")]
    expected = model.generate(
        [[{"role": role, "content": x} for role, x in turns]], 1, temperature=0.0, max_completion_length=8
    )
    assert [s["text"] for s in json.loads(out.read_text())["samples"]] == expected[0]
    without = dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, chat_template=None), files={})
    models.save_pretrained(tmp_path / "model", without)
    capsys.readouterr()
    assert run(tmp_path / "model", "--prompt=2", "--system=Be brief.") == 2
    assert "belong to a chat template, and this model has none; leave them out." in capsys.readouterr().err


def test_a_growing_conversation_compiles_few_programs(policy):
    opened = policies.open_policy(str(policy), {"max_completion_length": "2", "eval.samples": "1"})
    sampler = sampling.Sampler(opened, opened.load())
    ids = opened.tokenizer.encode("3")
    for length in (1, 32, 33, 50, 64, 65, 100):
        sampler([ids * length], write=lambda text: None)
    assert sampler._program(streams=True)._cache_size() == 3  # 32, 64 and 128 tokens


@pytest.mark.parametrize(
    "tokens, padded, doubled", [(1, 32, 32), (32, 32, 32), (33, 64, 64), (65, 96, 128), (257, 288, 512)]
)
def test_padded_lengths(tokens, padded, doubled):
    assert sampling.padded_length(tokens, doubling=False) == padded
    assert sampling.padded_length(tokens, doubling=True) == doubled


def test_a_session_keeps_the_conversation_and_streams_the_same_text(policy, capsys, monkeypatch):
    model = models.load_pretrained(policy)
    options = dict(temperature=0.0, max_completion_length=8)
    turn = lambda role, content: {"role": role, "content": content}
    first = model.generate([[turn("user", "hello")]], 1, **options)[0][0]
    talk = [turn("user", "hello"), turn("assistant", first), turn("user", "more")]
    second = model.generate([talk], 1, **options)[0][0]
    third = model.generate([[turn("user", "more")]], 1, **options)[0][0]
    assert second != third
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nmore\n/reset\nmore\n/exit\nnever\n"))
    assert run(policy, "--temperature=0") == 0
    shown = capsys.readouterr().out
    assert shown.count("log-probability") == 3
    parts = [visible(text) for text in (first, second, third)]
    assert all(part in shown for part in parts)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))  # ends without /exit, as Ctrl-D does
    assert run(policy, "--temperature=0") == 0
    assert capsys.readouterr().out.startswith(parts[0] + "\n(")


def test_input_that_is_no_text_is_one_sentence(policy, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert run(policy) == 1
    said = "A line of the standard input is not text in utf-8; convert it to utf-8."
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {said}"


def test_a_stream_writes_characters_whole():
    tokenizer = data.train_tokenizer(["3 + 4 = 7"], 260)  # one token per byte
    written = []
    stream = sampling.Stream(tokenizer, written.append)
    text = "aé€𝄞b"
    for token in tokenizer.encode(text):
        stream.token(token)
    assert [part for part in written if part] == list(text)
    cut = sampling.Stream(tokenizer, written.append)
    written.clear()
    ids = tokenizer.encode("aé")[:-1]
    for token in ids:
        cut.token(token)
    cut.end(tokenizer.completions([ids])[0])
    assert "".join(written) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\tb\nc é 𝄞", "a\tb\nc é 𝄞"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\rb\x08\x7f\x9b1m", "a\\rb\\x08\\x7f\\x9b1m"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
    ],
)
def test_control_characters_are_shown(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--prompt=a", "--prompts=b.txt"], "--prompt and --prompts both name prompts"),
        (["--prompt=a", "--top_p=0"], "config.eval.top_p"),
        (["--prompt=a", "--top_k=x"], "config.eval.top_k"),
        (["--prompt=a", "--temperature=-1"], "config.eval.temperature"),
        (["--prompt=a", "--samples=0"], "config.eval.samples"),
        (["--prompt="], "A prompt is empty; give a text."),
        (["--prompts=/nowhere/x.txt"], "/nowhere/x.txt"),
        (["--prompt=a\udcff"], "half of a surrogate pair or bytes that are not UTF-8"),
        (["--prompt=a", "--samples=3000000000"], "config.eval.samples is 3000000000; it must be at most 1048576"),
        (["--prompt=a", "--out=/nowhere/x.jsonl"], "--out=/nowhere/x.jsonl is in no directory; name a file."),
        (["--prompt=a", "--out=/"], "--out=/ is a directory; name a file."),
        (["--out=x.jsonl"], "--out writes the completions of --prompt or --prompts; give one of them."),
        (["--prompt=" + 20 * "long ", "--config.max_prompt_length=8"], "raise --config.max_prompt_length"),
    ],
)
def test_bad_flags_are_refused_in_a_sentence(policy, flags, said, capsys):
    assert run(policy, *flags) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err and captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("p.txt", "\ufeffa\r\n\r\n  \r\nb\u2028c\x0b\x85\n", ["a", "b\u2028c\x0b\x85"]),
        ("p.jsonl", '"a\u2028b\x85"\n\n{"prompt": "\u2029"}\n', ["a\u2028b\x85", {"prompt": "\u2029"}]),
        ("p.csv", '\ufeffa,b\r\n"1\n2\u2028",3\x85\r\n\r\n', [{"a": "1\n2\u2028", "b": "3\x85"}]),
        ("P.CSV", "a,b\n1,2\n", [{"a": "1", "b": "2"}]),
        ("P.TXT", "a\n", ["a"]),
    ],
)
def test_lines_end_at_line_feeds_only(name, content, found, tmp_path):
    (tmp_path / name).write_bytes(content.encode())
    assert generate.read_prompts(tmp_path / name) == found


def test_the_index_that_pandas_writes_is_left_out_as_in_training(tmp_path):
    (tmp_path / "p.csv").write_text(",age,bmi\n0,59,32.1\n1,48,21.6\n")
    with pytest.warns(UserWarning, match="the first column has no name, as an index that pandas writes"):
        assert generate.read_prompts(tmp_path / "p.csv") == [{"age": "59", "bmi": "32.1"}, {"age": "48", "bmi": "21.6"}]


def test_a_row_has_the_columns_of_the_template_and_may_hold_a_conversation(policy):
    turns = [{"role": "user", "content": "hello"}]
    assert generate.row_of({"prompt": json.dumps(turns), "hint": "h"})["question"] == turns
    assert generate.row_of(json.dumps(turns)) == {"question": json.dumps(turns)}
    assert generate.row_of({"messages": turns, "answer": 1}) == {"question": turns, "answer": 1}
    columns = {"question": "problem", "answer": "key"}
    assert (
        generate.row_of({"problem": "3"}, columns) == generate.row_of({"question": "3"}, columns) == {"question": "3"}
    )
    assert generate.row_of({"a": {"b": "3"}}, {"question": "a.b"})["question"] == "3"
    assert generate.row_of({"question": "3", "a": {"c": 2}}, {"question": "a.b"})["question"] == "3"
    with pytest.raises(ConfigError, match="A prompt is {'text': '3'}, and there is no column 'question', only 'text'"):
        generate.row_of({"text": "3"})
    with pytest.raises(ConfigError, match='give a text, or an object with a "question", a "prompt" or "messages"'):
        generate.row_of(3)
    row = generate.row_of({"question": "3", "hint": "4"})
    opened = policies.open_policy(str(policy), {})
    template = data.get_template("{hint} and {question}")
    assert generate.encode(opened, template, row) == opened.tokenizer.encode("4 and 3", add_bos=False)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("p.txt", b"caf\xe9\n", "is not text in UTF-8 .*at byte 3"),
        ("p.csv", b'a\n"x"y\n', "p.csv, line 2 is not readable as CSV"),
        ("p.csv", b"a,b,a\n1,2,3\n", "p.csv, line 1: columns 1 and 3 are both named 'a'; rename"),
        ("p.csv", b"a\n", "p.csv has a header and no rows"),
        ("p.csv", b"caf\xe9\n1\n", "p.csv, line 1 is not UTF-8"),
        ("p.txt", b"\n", "holds no prompts"),
        ("p.jsonl", b'"a"\n{"b"}\n', "p.jsonl, line 2, is not JSON"),
    ],
)
def test_damaged_files_of_prompts_are_sentences(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        generate.read_prompts(tmp_path / name)


def test_the_file_of_the_prompts_is_not_overwritten(policy, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a\n")
    assert run(policy, f"--prompts={tmp_path / 'p.txt'}", f"--out={tmp_path / 'p.txt'}") == 2
    assert "is the file of the prompts; name another one." in capsys.readouterr().err
    assert (tmp_path / "p.txt").read_text() == "a\n"


def test_characters_that_a_terminal_does_not_know_are_escapes_and_the_file_has_them(policy, tmp_path, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert run(policy, "--prompt=\u65e5", f"--out={tmp_path / 'out.jsonl'}") == 0
    shown.flush()
    assert shown.buffer.getvalue().startswith(b"> \\u65e5\n[1] ")
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["prompt"] == "\u65e5"


def test_a_prediction_that_is_not_finite_is_null_in_the_file(tmp_path, monkeypatch, capsys):
    inf, loaded = float("inf"), types.SimpleNamespace(programs=None, weights=None)
    monkeypatch.setattr(generate, "predict_rows", lambda *_: [Prediction(inf, 1.0, float("nan"), [inf, 1.0])])
    opened = types.SimpleNamespace(
        load=lambda: loaded, tokenizer=types.SimpleNamespace(target=TargetScaler(0.0, 1.0, -1.0, 1.0))
    )
    generate.regress(generate.Regression(opened, [{"a": 2}], [], tmp_path / "out.jsonl"))
    line = '{"row": {"a": 2}, "mean": null, "median": 1.0, "spread": null, "samples": [null, 1.0]}\n'
    assert (tmp_path / "out.jsonl").read_text() == line
    assert capsys.readouterr().out == '> {"a": 2}\ninf (2 samples, median 1.000, standard deviation nan)\n\n'


@pytest.mark.parametrize(
    "mean, std, sample, text",
    [
        (0.0, 1.0, 12.34567, "12.346 (1 samples, median 12.346"),
        (100_000.0, 2.3, 100_001.6789, "100001.679 (1 samples, median 100001.679"),
        (180_000.0, 80_000.0, 180_123.4, "180123 (1 samples, median 180123"),
        (2e12, 1e9, 2.0012345e12, "2001234500000 (1 samples, median 2001234500000"),
        (0.0, 1e-9, 1.23456e-9, "1.23456e-09 (1 samples, median 1.23456e-09"),
        (0.0, 1.0, 1e20, "1e+20 (1 samples, median 1e+20"),
    ],
)
def test_a_prediction_has_the_digits_of_its_target(mean, std, sample, text, monkeypatch, capsys):
    loaded = types.SimpleNamespace(programs=None, weights=None)
    monkeypatch.setattr(generate, "predict_rows", lambda *_: [Prediction(sample, sample, 0.0, [sample])])
    scale = TargetScaler(mean, std, -1.0, 1.0)
    opened = types.SimpleNamespace(load=lambda: loaded, tokenizer=types.SimpleNamespace(target=scale))
    generate.regress(generate.Regression(opened, [{"a": 2}], [], None))
    assert capsys.readouterr().out.splitlines()[1].startswith(text)


def test_bytes_that_are_no_text_do_not_end_a_session(policy, capsys, monkeypatch):
    lines = io.TextIOWrapper(io.BytesIO(b"a\xff\nb\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", lines)
    assert run(policy) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("error: The prompt ") and shown.count("log-probability") == 1


def test_a_csv_file_with_torn_rows_is_refused(policy, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("question,answer\n1 + 1,2\n2 + 2\n")
    assert run(policy, f"--prompts={tmp_path / 'rows.csv'}") == 2
    assert "rows.csv, line 3 has 1 cell, but the header names 2 columns." in capsys.readouterr().err
