"""Tests `Policy.generate`: greedy texts against `apply`, samples against a rollout, chat, meshes and errors."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_decoder as reference
import jaxrl_reason
from jaxrl_reason import data, models
from jaxrl_reason.models import sharding
from jaxrl_reason.models.decoding import rollout, texts
from jaxrl_reason.rl import programs

pytestmark = pytest.mark.usefixtures("quick_compilation")

T = 6
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
TOKENIZER = dataclasses.replace(data.train_tokenizer(["3 + 4 = 7"], 262), chat_template=CHAT)
CONFIG = models.ModelConfig(
    vocab_size=TOKENIZER.vocab_size, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, tied_embedding=False
)
PARAMS = jax.tree.map(jnp.asarray, reference.random_params(CONFIG, seed=3, scale=0.3))
POLICY = models.Policy(CONFIG, PARAMS, TOKENIZER)
PROMPTS = ["3 + 4 = ?", "2", "How much is 12 + 5?"]
generate = functools.partial(POLICY.generate, max_completion_length=T)


def test_greedy_texts_are_those_of_a_loop_over_apply():
    found = generate(PROMPTS, 2, temperature=0.0)
    for prompt, (one, other) in zip(PROMPTS, found):
        ids = TOKENIZER.encode(prompt)
        start = len(ids)
        padded = lambda: np.array([ids + [0] * (start + T - len(ids))])
        for _ in range(T):
            ids.append(int(POLICY.apply(PARAMS, padded())[0, len(ids) - 1].argmax()))
            if ids[-1] in TOKENIZER.eos_ids:
                break
        assert one == other == TOKENIZER.completions([ids[start:]])[0] and one


def test_samples_are_those_of_an_evaluation_whatever_the_batch_size():
    assert texts.EVALUATION == programs.EVAL
    ids = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    length = max(map(len, ids))
    tokens = np.array([row + [0] * (length - len(row)) for row in ids])
    mask = np.arange(length) < np.array([[len(row)] for row in ids])
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), programs.EVAL), 0)
    sizes = dict(group_size=3, max_length=T, eos_ids=TOKENIZER.eos_ids, pad_id=TOKENIZER.pad_id)
    run = jax.jit(functools.partial(rollout.generate, CONFIG, **sizes))
    out = run(PARAMS, tokens, mask, np.arange(3), key, temperature=1.3, top_k=40, top_p=0.9)
    expected = [
        [TOKENIZER.completions([np.asarray(t)[np.asarray(m)].tolist()])[0] for t, m in zip(*group)]
        for group in zip(out.tokens, out.mask)
    ]
    options = dict(temperature=1.3, top_k=40, top_p=0.9, seed=7)
    assert generate(PROMPTS, 3, **options) == expected
    assert generate(PROMPTS, 3, batch_size=2, **options) == expected
    assert len({text for group in expected for text in group}) == 9
    assert generate(PROMPTS, 3, **options | {"seed": 8}) != expected
    assert generate([], 3) == []


def test_a_conversation_is_rendered_and_a_text_is_not():
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}]
    written = "[system]Add.[user]1 + 1?[assistant]"
    ids = lambda prompt, chat: texts.encode_prompts(TOKENIZER, [prompt], chat)[0]
    assert ids(turns, None) == ids(turns, True) == ids(written, None) == TOKENIZER.encode(written)
    assert ids("1 + 1?", True) == TOKENIZER.encode("[user]1 + 1?[assistant]") != ids("1 + 1?", False)
    with_bos = dataclasses.replace(TOKENIZER, adds_bos=True)
    assert texts.encode_prompts(with_bos, ["1", [turns[1]]], None) == [
        [1, *TOKENIZER.encode("1")],
        TOKENIZER.encode("[user]1 + 1?[assistant]"),
    ]


@pytest.mark.parametrize(
    "prompts, options, said",
    [
        ("3 + 4", {}, "prompts is one text; give a list of prompts."),
        (["a", ""], {}, "Prompt 1 is empty; a prompt has at least one token."),
        (["a", 3], {}, "Prompt 1 is 3; a prompt is a text or a list of turns."),
        ([[{"role": "user"}]], {}, "Prompt 0 cannot be rendered: .*turn 0 has to have a role and a content"),
        ([[{"role": "user", "content": "a"}]], {"chat": False}, "Prompt 0 is a conversation, and chat is False"),
        (["a"], {"samples": 0}, "samples is 0; it has to be at least 1."),
        (["a"], {"max_completion_length": 0}, "max_completion_length is 0; "),
        (["a"], {"batch_size": 0}, "batch_size is 0; "),
        (["a"], {"temperature": -1.0}, "temperature is -1.0; "),
        (["a"], {"temperature": float("nan")}, "temperature is nan; "),
        (["a"], {"top_p": 0.0}, "top_p is 0.0; "),
        (["a"], {"top_p": 1.1}, "top_p is 1.1; "),
        (["a"], {"top_k": -1}, "top_k is -1; "),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(prompts, options, said):
    with pytest.raises(ValueError, match=said):
        POLICY.generate(prompts, **options)


def test_models_that_cannot_generate_say_so():
    with pytest.raises(models.PretrainedError, match="no tokenizer"):
        models.Policy(CONFIG, PARAMS).generate(["a"])
    with pytest.raises(models.PretrainedError, match="A reward model scores texts and samples none"):
        models.RewardModel(CONFIG, PARAMS, TOKENIZER).generate(["a"])
    plain = models.Policy(CONFIG, PARAMS, dataclasses.replace(TOKENIZER, chat_template=None))
    with pytest.raises(ValueError, match="Prompt 0 cannot be rendered: the tokenizer has no chat template"):
        plain.generate(["a"], chat=True)


@pytest.mark.runs
def test_texts_on_eight_devices_equal_those_on_one():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    folders = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(jaxrl_reason.__file__).parents[1])]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == generate(PROMPTS, 3, temperature=1.3)


if __name__ == "__main__":
    mesh = sharding.make_mesh(2, 4, 1)  # the mesh does not divide the vocabulary
    placed = jax.device_put(PARAMS, models.param_shardings(CONFIG, mesh))
    found = models.Policy(CONFIG, placed, TOKENIZER).generate(
        PROMPTS, 3, max_completion_length=T, temperature=1.3, batch_size=3
    )
    print(json.dumps(found))
