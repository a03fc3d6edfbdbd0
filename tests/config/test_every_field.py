"""Every field of the configuration changes something.

The table names, for each field, another value than that of `tiny`, and the cheapest observer that notices the change.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from helpers import observers as see
from helpers.configurations import LEAVES
from helpers.tiny_runs import change, ROWS, tiny, write_rows
from jaxrl_reason import config as config_lib
from jaxrl_reason import data, train

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Writes rows.jsonl and its variants: a bad row, other rows, a long prompt, another column, tables, rewards."""
    directory = tmp_path_factory.mktemp("rows")
    write_rows(directory / "bad.jsonl", [*ROWS, {"question": "?"}])
    write_rows(
        directory / "other.jsonl", [{"question": f"Say {i}.", "solution": f"#### {i}", "answer": i} for i in range(20)]
    )
    write_rows(directory / "long.jsonl", [*ROWS, {**ROWS[0], "question": "word " * 40}])
    solution = "It is nothing special, as far as anybody knows."
    varied = [
        {"question": f"What is {c * 6} and {i}?", "solution": solution, "answer": i}
        for i, c in enumerate("abcdefghijklmnopqrst")
    ]
    write_rows(directory / "varied.jsonl", varied)
    write_rows(directory / "renamed.jsonl", [{**row, "problem": row["question"].upper()} for row in ROWS])
    tokenizer = data.train_tokenizer(["abc"] * 9, 280)
    tokenizer.save(directory / "tokenizer")
    template = "{{ shout }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    dataclasses.replace(tokenizer, chat_template=template).save(directory / "chat")
    (directory / "reward.py").write_text(
        "import os, time\n"
        "def often_fails(completions, row, **_):\n"
        "    if any(r % 4 == 0 for r in row):\n"
        "        raise ValueError('no')\n"
        "    return [1.0] * len(row)\n"
        "def heavy(completions, row, **_):\n"
        "    time.sleep(1.0 * (row[0] == 1))\n"
        "    return [float(len(bytes(2**29 * (row[0] == 2))) > 0)] * len(row)\n"
        "def pid(completions, **_):\n"
        "    time.sleep(0.5)\n"
        "    return [float(os.getpid())] * len(completions)\n"
        "def length(completions, **_):\n"
        "    return [float(len(text)) for text in completions]\n"
        "def always(completions, **_):\n"
        "    return [1.0] * len(completions)\n"
    )
    graded = [row | {"chosen": row["solution"], "rejected": "#### no", "value": row["row"] / 40} for row in ROWS]
    write_rows(directory / "graded.jsonl", graded)
    write_rows(directory / "pairs.jsonl", [row | {"rejected": "#### never"} for row in graded])
    table = [f"{i},{i * i % 7},{i % 2}" for i in range(16)]
    (directory / "table.csv").write_text("\n".join(["y,b,c", *table]) + "\n")
    (directory / "gaps.csv").write_text("\n".join(["y,b,c", *table, "3,,1"]) + "\n")
    (directory / "texts.csv").write_text("\n".join(["y,b,c,d", *(line + ",red" for line in table)]) + "\n")
    return write_rows(directory / "rows.jsonl")


@pytest.fixture(scope="module")
def compiled_run(rows, tmp_path_factory):
    """Sets up a run. Runs that differ only between steps share its compiled programs."""
    return train.setup(tiny(rows, eval__every=1), tmp_path_factory.mktemp("compiled_run"))


@pytest.fixture(scope="module")
def finished():
    """Caches finished runs: configuration -> (work directory, printed text)."""
    return {}


def after_training(look, **keywords):
    """Returns the observer that trains a whole run and looks at its work directory and its output."""
    return functools.partial(see.trained, look, **keywords)


HERE = "{rows}"  # replaced by the directory of the fixture `rows`
LONG = dict(data__train=f"{HERE}/long.jsonl", data__eval=f"{HERE}/rows.jsonl")
WORD_PROBLEMS = dict(
    data__train="word_problems",
    data__train_split="train[:50]",
    data__eval=f"{HERE}/rows.jsonl",
    data__data_dir="{data_dir}",
    max_prompt_length=64,
)
WINDOW = dict(model__layers=2, model__sliding_window=2)
NEVER_MIXED = dict(method={"name": "dapo"}, max_completion_length=1)
SUPERVISED = dict(supervised__steps=40)
CHAT = dict(data__tokenizer=f"{HERE}/chat", max_prompt_length=64)
ADAPTERS = dict(lora__rank=2)
TRAINED = dict(steps=3, checkpoint__keep=9, checkpoint__every=1)
GRADED = dict(data__train=f"{HERE}/graded.jsonl")
PAIRS = GRADED | dict(reward__functions=["accuracy", "reward_model"], reward_model__steps=2, reward_model__batch_size=4)
NUMBERS = dict(
    data__train=f"{HERE}/table.csv",
    data__train_split="[:8]",
    data__eval_split="[8:]",
    regression__tokenizer="normalized",
    regression__target="y",
    reward__functions=["squared_error"],
    max_completion_length=8,
    supervised__steps=2,
)

# field -> (another value, observer, fields that both configurations change)
EFFECTS = {
    "seed": (1, see.sampled, {}),
    "steps": (2, after_training(see.metric_steps), TRAINED),
    "prompts_per_step": (8, see.rollout_shape, {}),
    "group_size": (8, see.rollout_shape, {}),
    "max_prompt_length": (200, see.rollout_shape, LONG | dict(data__on_long_prompt="skip")),
    "max_completion_length": (9, see.rollout_shape, {}),
    "compilation_cache": ("here", see.compilation_cache, {}),
    "method": ({"name": "rloo"}, see.prepared, {}),
    "model.path": (f"{HERE}/nowhere", see.prompts, {}),
    "lora.rank": (2, see.model, {}),
    "lora.alpha": (3.0, see.model, ADAPTERS),
    "lora.projections": (["q"], see.model, ADAPTERS),
    "model.width": (20, see.model, {}),
    "model.layers": (2, see.model, {}),
    "model.heads": (4, see.model, {}),
    "model.kv_heads": (1, see.model, {}),
    "model.head_dim": (4, see.model, {}),
    "model.mlp_width": (20, see.model, {}),
    "model.activation": ("gelu", see.model, {}),
    "model.rope_theta": (100.0, see.model, {}),
    "model.rope_scaling": ({"kind": "linear", "factor": 4.0}, see.model, {}),
    "model.sliding_window": (2, see.model, {}),
    "model.sliding_period": (2, see.model, WINDOW),
    "model.local_rope_theta": (10.0, see.model, WINDOW | dict(model__sliding_period=2)),
    "model.norm_eps": (0.1, see.model, {}),
    "model.norm_offset": (1.0, see.model, {}),
    "model.post_norms": (True, see.model, {}),
    "model.embedding_scale": (4.0, see.model, {}),
    "model.query_scale": (1.0, see.model, {}),
    "model.qkv_bias": (True, see.model, {}),
    "model.qk_norm": (True, see.model, {}),
    "model.tied_embedding": (False, see.model, {}),
    "model.param_dtype": ("bfloat16", see.model, {}),
    "model.compute_dtype": ("bfloat16", see.model, {}),
    "model.remat": ("layer", see.backward_pass, {}),
    "model.attention": ("splash", see.evaluation_program, {}),
    "data.train": (f"{HERE}/other.jsonl", see.prompts, {}),
    "data.train_split": ("[:4]", see.prompts, {}),
    "data.eval": (f"{HERE}/other.jsonl", see.held_out, {}),
    "data.eval_split": ("[10:]", see.held_out, {}),
    "data.data_dir": (f"{HERE}/rows.jsonl/no_directory", see.prompts, WORD_PROBLEMS),
    "data.columns": ({"question": "problem"}, see.prompts, dict(data__train=f"{HERE}/renamed.jsonl")),
    "data.eval_columns": (
        {"question": "problem"},
        see.held_out,
        dict(data__eval=f"{HERE}/renamed.jsonl"),
    ),
    "data.template": ("qa", see.prompts, dict(max_prompt_length=64)),
    "data.chat": (True, see.prompts, CHAT),
    "data.system": ("Be short.", see.prompts, CHAT | dict(data__chat=True)),
    "data.chat_options": ({"shout": "HEY"}, see.prompts, CHAT | dict(data__chat=True)),
    "data.on_bad_row": ("skip", see.prompts, dict(data__train=f"{HERE}/bad.jsonl", data__eval=f"{HERE}/rows.jsonl")),
    "data.on_long_prompt": ("skip", see.prompts, LONG),
    "data.tokenizer": (f"{HERE}/tokenizer", see.prompts, {}),
    "data.vocab_size": (
        310,
        lambda c, path: see.setup(c, path).model.vocab_size,
        dict(data__train=f"{HERE}/varied.jsonl"),
    ),
    "data.add_bos": (True, see.prompts, {}),
    "supervised.steps": (20, see.supervised_optimizer, SUPERVISED),
    "supervised.batch_size": (8, see.solutions, SUPERVISED),
    "supervised.learning_rate": (0.1, see.supervised_optimizer, SUPERVISED),
    "data.values": ("shuffled", see.values, GRADED | dict(method={"name": "rlev"})),
    "supervised.start_from": (f"{HERE}/nowhere", see.prompts, {}),
    "regression.tokenizer": ("p10", see.numbers, NUMBERS),
    "regression.tokenizer_options": ({"base": 3}, see.numbers, NUMBERS),
    "regression.target": ("b", see.numbers, NUMBERS),
    "regression.value": ("b", see.numbers, NUMBERS),
    "regression.missing": ("mean", see.numbers, NUMBERS | dict(data__train=f"{HERE}/gaps.csv")),
    "regression.categorical": ("drop", see.numbers, NUMBERS | dict(data__train=f"{HERE}/texts.csv")),
    "regression.inputs": ("text", see.numbers, NUMBERS | dict(max_prompt_length=64)),
    "regression.prefix_length": (2, see.numbers, NUMBERS),
    "regression.encoder_width": (16, see.numbers, NUMBERS),
    "regression.encoder_layers": (2, see.numbers, NUMBERS),
    "regression.encoder_dropout": (0.5, see.supervised_update, NUMBERS),
    "regression.validation_split": ("[4:]", see.validation, NUMBERS),
    "regression.validation_every": (1, see.validated_steps, NUMBERS | dict(regression__validation_split="[:8]")),
    "reward_model.path": (f"{HERE}/nowhere", see.pairs, PAIRS),
    "reward_model.system": ("Be strict.", see.pairs, PAIRS),
    "reward_model.max_length": (100, see.pairs, PAIRS),
    "reward_model.data": (f"{HERE}/pairs.jsonl", see.pairs, PAIRS),
    "reward_model.split": ("[:4]", see.pairs, PAIRS),
    "reward_model.eval_split": ("[4:]", see.pairs, PAIRS),
    "reward_model.steps": (3, see.reward_model, PAIRS),
    "reward_model.batch_size": (8, see.pairs, PAIRS),
    "reward_model.learning_rate": (0.1, see.reward_model, PAIRS),
    "reward.functions": (["format"], see.scored, {}),
    "reward.weights": ([1.0, 0.25], see.prepared, dict(reward__functions=["accuracy", "format"])),
    "reward.verdict": ("format", see.scored, dict(reward__functions=["accuracy", "format"])),
    "reward.max_failure_share": (
        0.1,
        see.scored,
        dict(reward__functions=["accuracy", f"{HERE}/reward.py:often_fails"]),
    ),
    "reward.skip_special_tokens": (True, see.scored, dict(reward__functions=[f"{HERE}/reward.py:length"])),
    "reward.workers": (3, see.workers, dict(reward__functions=[f"{HERE}/reward.py:pid"], reward__workers=1)),
    "reward.timeout_s": (0.3, see.scored, dict(reward__functions=[f"{HERE}/reward.py:heavy"])),
    "reward.memory_mb": (64, see.scored, dict(reward__functions=[f"{HERE}/reward.py:heavy"])),
    "sampling.mismatch_limit": (1e-12, after_training(lambda _, out: "mismatch_limit" in out), TRAINED),
    "sampling.temperature": (0.5, see.sampled, {}),
    "sampling.quantize": ("int8", see.sampled, {}),
    "sampling.importance_cap": (0.5, see.loss, dict(sampling__quantize="int8")),
    "sampling.mask_truncated_completions": (True, see.prepared, {}),
    "sampling.halvings": (1, see.rollout_program, {}),
    "sampling.cache_pieces": (2, see.rollout_program, {}),
    "sampling.parts": (2, see.drawn, {}),
    "sampling.max_batches": (3, see.dynamic_sampling, NEVER_MIXED),
    "optimizer.learning_rate": (0.1, see.optimizer, {}),
    "optimizer.schedule": ("linear", see.optimizer, {}),
    "optimizer.warmup_steps": (2, see.optimizer, {}),
    "optimizer.weight_decay": (0.5, see.optimizer, {}),
    "optimizer.b1": (0.1, see.optimizer, {}),
    "optimizer.b2": (0.1, see.optimizer, {}),
    "optimizer.eps": (1.0, see.optimizer, {}),
    "optimizer.max_grad_norm": (0.1, see.optimizer, {}),
    "optimizer.float32_master": (True, see.small_steps, dict(model__param_dtype="bfloat16")),
    "optimizer.max_skipped": (2, after_training(see.metric_steps, spoilt=True), TRAINED),
    "update.epochs": (2, see.update_program, {}),
    "update.minibatches": (2, see.update_program, {}),
    "update.accumulation": (2, see.update_program, {}),
    "update.lengths": (2, see.update_program, {}),
    "update.wave_tokens": (1, see.update_program, dict(update__lengths=2)),
    "update.logprob_chunk": (2, see.update_program, {}),
    "update.kl_coefficient": (0.5, see.loss, {}),
    "update.kl_kind": ("k1", see.loss, dict(update__kl_coefficient=0.5)),
    "update.entropy_coefficient": (0.5, see.loss, {}),
    "mesh.data": (-1, see.mesh, dict(mesh__fsdp=-1)),
    "mesh.fsdp": (3, see.mesh, {}),
    "mesh.tensor": (2, see.mesh, {}),
    "mesh.slice": (2, see.mesh, {}),
    "mesh.rollout_tensor": (2, see.mesh, {}),
    "mesh.initialization_timeout": (7, see.connected, {}),
    "mesh.host_timeout": (7, see.connected, {}),
    "checkpoint.every": (2, after_training(see.checkpoint_numbers), TRAINED),
    "checkpoint.keep": (2, after_training(see.checkpoint_numbers), TRAINED),
    "eval.every": (2, after_training(see.evaluated_steps), TRAINED | dict(eval__every=3)),
    "eval.prompts": (3, see.held_out, {}),
    "eval.samples": (3, see.eval_shape, {}),
    "eval.temperature": (0.0, see.evaluated, {}),
    "eval.top_k": (3, see.evaluated, {}),
    "eval.top_p": (0.5, see.evaluated, {}),
    "eval.verdict": (
        f"{HERE}/reward.py:always",
        see.judged,
        dict(reward__functions=["accuracy", f"{HERE}/reward.py:always"]),
    ),
    "checkpoint.keep_start": (True, after_training(lambda path, _: (path / "start").exists()), TRAINED),
    "log.samples_every": (1, after_training(see.lines("samples.jsonl")), TRAINED),
    "log.samples": (4, after_training(see.lines("samples.jsonl")), TRAINED | dict(log__samples_every=1)),
    "log.tensorboard": (True, after_training(lambda path, _: (path / "tensorboard").exists()), TRAINED),
    "log.trackers": (["wandb"], see.tracked, {}),
    "log.profile": ([2, 2], after_training(lambda path, _: (path / "profile").exists()), TRAINED),
    "log.progress": (True, after_training(lambda _, out: "RL 1/3" in out), TRAINED),
    "log.heartbeat": (1e-3, after_training(lambda _, out: "has been going on for" in out), TRAINED),
}


def test_the_table_covers_every_field():
    assert sorted(EFFECTS) == sorted(LEAVES)


@pytest.fixture(scope="module")
def observed():
    """Caches observations of the configurations that several fields start from."""
    return {}


def same(a, b) -> bool:
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def trains(observe) -> bool:
    """Returns whether an observer trains or samples with freshly compiled programs."""
    return getattr(observe, "func", observe) in (
        see.trained,
        see.reward_model,
        see.dynamic_sampling,
        see.drawn,
        see.judged,
    )


SECONDS = (
    "regression.encoder_dropout",
    "regression.validation_every",
    "reward.workers",
    "reward.timeout_s",
    "reward.memory_mb",
    "seed",
    "update.kl_coefficient",
    "sampling.quantize",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.runs) if trains(observe) or name in SECONDS else name
        for name, (_, observe, _) in EFFECTS.items()
    ],
)
def test_every_field_changes_something(name, rows, observed, tmp_path, request):
    value, observe, base = EFFECTS[name]

    def here(x):
        if isinstance(x, list):
            return [here(y) for y in x]
        if x == "{data_dir}":
            return str(request.getfixturevalue("data_dir"))
        return x.replace(HERE, str(rows.parent)) if isinstance(x, str) else x

    before = tiny(rows, **{k: here(v) for k, v in base.items()})
    after = change(tiny(rows, **{k: here(v) for k, v in base.items()}), **{name.replace(".", "__"): here(value)})
    assert config_lib.to_dict(before) != config_lib.to_dict(after)
    extra = ("compiled_run", "capsys", "finished") if getattr(observe, "func", None) is see.trained else ()
    extra = [request.getfixturevalue(fixture) for fixture in extra]
    key = observe, json.dumps(config_lib.to_dict(before))
    if key not in observed:
        observed[key] = observe(before, tmp_path / "before", *extra)
    old, new = observed[key], observe(after, tmp_path / "after", *extra)
    assert same(old, old) and not same(old, new), f"config.{name} changes nothing: {str(old)[:300]}"
    errors = [x for x in (old, new) if isinstance(x, str) and x.startswith("error: ")]
    assert len(errors) < 2, errors
