"""Tests runs that begin with a pretrained model, from a directory to checkpoints, adapters and an export."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from helpers import reference_decoder
from helpers.tiny_runs import ROWS, tiny, with_program, write_rows
from jaxrl_reason import config as config_lib
from jaxrl_reason import data, evaluate, export, models, reward_training, runs, train
from jaxrl_reason.config import Lora, Model, Regression, Reward, RewardModel
from jaxrl_reason.models import ModelConfig, sharding
from jaxrl_reason.models.decoding import texts
from jaxrl_reason.rewards import model_training
from jaxrl_reason.runs import checkpoints
from jaxrl_reason.tasks import supervised

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("quick_compilation")]

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Writes a small random model in the layout of the hub, with two end tokens and a chat template."""
    texts = [f"{row['question']}\n{row['solution']}<user><assistant>" for row in ROWS]
    tokenizer = dataclasses.replace(data.train_tokenizer(texts, 300), eos_ids=(2, 20), chat_template=CHAT)
    config = ModelConfig(
        vocab_size=310, width=16, layers=2, heads=2, kv_heads=1, mlp_width=24, qkv_bias=True, rope_theta=5000.0
    )
    policy = models.Policy(config, reference_decoder.random_params(config, scale=0.3), tokenizer)
    directory = tmp_path_factory.mktemp("model") / "base"
    models.save_pretrained(directory, policy)
    (directory / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    return directory


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def a_config(rows, path, **changes):
    defaults = dict(
        model=Model(path=str(path)),
        max_prompt_length=40,
        reward=Reward(functions=["tests_reward.py:length"]),
        optimizer__learning_rate=1e-2,
        checkpoint__every=1,
        eval__every=2,
    )
    return tiny(rows, **defaults | changes)


@pytest.fixture(scope="module", autouse=True)
def a_reward(tmp_path_factory):
    """Writes a reward that differs between the completions of a group."""
    directory = tmp_path_factory.mktemp("reward")
    file = directory / "tests_reward.py"
    file.write_text("def length(completion_ids, **_):\n    return [float(sum(ids) % 7) for ids in completion_ids]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def weights_of(workdir):
    _, policy = export.load_policy(workdir)
    return policy


@pytest.fixture(scope="module")
def trained(rows, model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("full") / "run"
    train.train(train.setup(a_config(rows, model), workdir))
    return workdir


@pytest.fixture(scope="module")
def adapted(rows, model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapters") / "run"
    config = a_config(
        rows, model, lora=Lora(rank=2, projections=["q", "down"]), update__kl_coefficient=0.1, data__chat=True
    )
    train.train(train.setup(config, workdir))
    return workdir


def test_a_run_begins_with_the_model_and_its_tokenizer(trained, rows, model, tmp_path):
    run = train.setup(a_config(rows, model), tmp_path / "new")
    assert run.model.qkv_bias and run.model.rope_theta == 5000 and run.model.vocab_size == 310
    assert run.tokenizer.eos_ids == (2, 20)
    start = supervised.first_state(run.task, run.programs)
    jax.tree.map(np.testing.assert_array_equal, start.params, models.load_pretrained(model).params)
    # The files of the tokenizer and the model's description are kept unchanged.
    for name in ("tokenizer.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        assert json.loads((trained / "tokenizer" / name).read_text()) == json.loads((model / name).read_text())
    assert lines_of(trained)[-1]["sampling/logp_difference_max"] < 1e-4


@pytest.mark.slow
def test_a_run_goes_on_without_the_directory_it_began_with(rows, model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    config = a_config(rows, base, steps=1)
    train.train(train.setup(config, tmp_path / "run"))
    shutil.rmtree(base)
    config.steps = 2
    train.train(train.setup(config, tmp_path / "run"))
    whole = tmp_path / "whole"
    shutil.copytree(model, base)
    train.train(train.setup(config, whole))
    jax.tree.map(np.testing.assert_array_equal, weights_of(tmp_path / "run").params, weights_of(whole).params)


def test_the_exported_directory_is_the_policy_that_was_trained(trained, model, tmp_path, capsys):
    assert export.main([f"--workdir={trained}", f"--out={tmp_path / 'out'}"]) == 0
    assert f"Checkpoint 2 is in {tmp_path / 'out'}." in capsys.readouterr().out
    found, base = models.load_pretrained(tmp_path / "out"), models.load_pretrained(model)
    jax.tree.map(np.testing.assert_array_equal, found.params, weights_of(trained).params)
    assert np.abs(found.params["layers"]["q"] - base.params["layers"]["q"]).max() > 1e-3
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in model.iterdir()} | {"README.md"}  # the model card
    for name in ("tokenizer.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((model / name).read_text())
    # An earlier checkpoint can be exported in another dtype.
    flags = [f"--workdir={trained}", f"--out={tmp_path / 'first'}", "--checkpoint=1", "--dtype=bfloat16"]
    assert export.main(flags) == 0
    first = models.load_pretrained(tmp_path / "first", dtype="bfloat16")
    _, one = export.load_policy(trained, 1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype("bfloat16")), first.params, one.params)


@pytest.mark.slow
def test_an_own_model_is_exported_and_trained_further(rows, tmp_path):
    config = tiny(rows, model=Model(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16, qk_norm=True), steps=1)
    train.train(train.setup(config, tmp_path / "first"))
    assert export.main([f"--workdir={tmp_path / 'first'}", f"--out={tmp_path / 'out'}"]) == 0
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["model_type"] == "qwen3" and content["max_position_embeddings"] == 22
    run = train.setup(tiny(rows, model=Model(path=str(tmp_path / "out"))), tmp_path / "second")
    jax.tree.map(
        np.testing.assert_array_equal,
        supervised.first_state(run.task, run.programs).params,
        weights_of(tmp_path / "first").params,
    )


def test_adapters_alone_are_trained(adapted, model):
    policy, base = weights_of(adapted), models.load_pretrained(model)
    trained, frozen = models.lora.split(policy.config, policy.params)
    jax.tree.map(np.testing.assert_array_equal, frozen, base.params)
    assert set(trained["layers"]) == {"q_a", "q_b", "down_a", "down_b"}
    assert all(np.abs(x).max() > 1e-3 for x in trained["layers"].values())
    first, last = lines_of(adapted)[1], lines_of(adapted)[-1]
    assert abs(first["kl"]) < 1e-6 < last["kl"]  # the reference is the base without adapters
    start = sum(p.stat().st_size for p in (adapted / "start").rglob("*") if p.is_file())
    whole = sum(p.stat().st_size for p in (adapted / "checkpoints" / "2").rglob("*") if p.is_file())
    assert start < whole / 4  # only the adapters of the reference are kept


def test_adapters_are_exported_merged_or_alone(adapted, model, tmp_path):
    assert export.main([f"--workdir={adapted}", f"--out={tmp_path / 'merged'}"]) == 0
    assert export.main([f"--workdir={adapted}", f"--out={tmp_path / 'alone'}", "--adapters"]) == 0
    policy, merged = weights_of(adapted), models.load_pretrained(tmp_path / "merged")
    tokens = np.arange(20).reshape(2, 10)
    expected = np.asarray(models.apply(policy.config, policy.params, tokens))
    np.testing.assert_allclose(merged.apply(merged.params, tokens), expected, atol=1e-5)
    base = models.load_pretrained(model)
    assert np.abs(base.apply(base.params, tokens) - expected).max() > 1e-3
    content = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(model) and content["target_modules"] == ["q_proj", "down_proj"]
    stored = safetensors.numpy.load_file(tmp_path / "alone" / "adapter_model.safetensors")
    a = stored["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    np.testing.assert_array_equal(a.T, policy.params["layers"]["q_a"][1])
    assert (tmp_path / "alone" / "tokenizer.json").exists()


def test_adapters_on_bfloat16_weights_are_merged_in_the_dtype_of_the_export(rows, model, tmp_path):
    dtypes = dict(model__param_dtype="bfloat16", model__compute_dtype="bfloat16")
    run = train.setup(a_config(rows, model, lora=Lora(rank=2, projections=["q"]), **dtypes), tmp_path / "run")
    state = supervised.first_state(run.task, run.programs)
    saver = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints", 1)
    saver.save(1, state._replace(trained=jax.tree.map(lambda x: x + 0.01, state.trained)))
    saver.close()
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--dtype=float32"]) == 0
    policy, found = weights_of(tmp_path / "run"), models.load_pretrained(tmp_path / "out").params
    layers = jax.tree.map(lambda x: np.asarray(x, np.float32), policy.params["layers"])
    wanted = layers["q"] + policy.config.lora_scale * layers["q_a"] @ layers["q_b"]
    assert np.abs(wanted - layers["q"]).max() > 1e-4
    np.testing.assert_allclose(found["layers"]["q"], wanted, atol=1e-6)
    np.testing.assert_array_equal(found["layers"]["k"], layers["k"])


def test_a_run_with_adapters_resumes_bit_for_bit_and_is_evaluated(adapted, rows, model, tmp_path, capsys):
    config = runs.load_config(adapted, {})
    half = tmp_path / "half"
    config.steps = 1
    train.train(train.setup(config, half))
    config.steps = 2
    train.train(train.setup(config, half))
    jax.tree.map(np.testing.assert_array_equal, weights_of(half).params, weights_of(adapted).params)
    assert evaluate.main([f"--workdir={adapted}", f"--out={tmp_path / 'evaluation'}"]) == 0
    length = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["metrics"]["mean_length"]
    assert length == pytest.approx(lines_of(adapted)[-1]["eval/mean_length"])


def test_prompts_stand_in_the_chat_template(rows, model, tmp_path):
    config = a_config(rows, model, data__chat=True, data__system="Be short.")
    batch = train.setup(config, tmp_path / "run").prompts.batch(0)
    tokenizer = data.load_tokenizer(model)
    text = tokenizer.decode(batch.tokens[0][batch.mask[0]], skip_special=False)
    question = batch.rows[0]["question"]
    assert text == f"<bos><system>Be short.<eos><user>{question}<eos><assistant>"
    assert list(batch.tokens[0]).count(1) == 1  # one begin token


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model=Model(path="nowhere")), "There is no nowhere: give a directory"),
        (dict(model__width=64), "config.model.width is 64; the model of config.model.path has its own"),
        (dict(model__qk_norm=True), "config.model.qk_norm is True"),
        (dict(lora=Lora(rank=2, projections=["query"])), "config.lora.projections is ['query']; it must name some of"),
        (dict(lora=Lora(alpha=3.0)), "config.lora.rank is 0; set it, or leave out"),
        (
            dict(data__system="Hello"),
            "config.data.system and config.data.chat_options belong to the model's chat template",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(changes, message, rows, model, tmp_path):
    with pytest.raises(ValueError) as caught:
        train.setup(a_config(rows, model, **changes), tmp_path / "run")
    assert message in str(caught.value) and not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_is_refused_at_setup(rows, model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json; name one in config.data.tokenizer"):
        train.setup(a_config(rows, base), tmp_path / "run")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        train.setup(a_config(rows, base), tmp_path / "run")
    big = tmp_path / "big"
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (500, 4))
    data.train_tokenizer(["".join(word) for word in letters for _ in range(3)], 400).save(big)
    with pytest.raises(ValueError, match="The tokenizer has 400 tokens, and the model of config.model.path has 310"):
        train.setup(a_config(rows, model, data__tokenizer=str(big)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--workdir=x"], "--out=DIR is missing"),
        (["--out=x"], "--workdir=DIR is missing"),
        (["--workdir=x", "--ot=y"], "There is no flag '--ot'. Did you mean '--out'"),
        (["--workdir=x", "--out"], "--out needs a value"),
        (["--workdir=x", "--out=y", "--checkpoint=last"], "--checkpoint=last: expected a number"),
        (["--workdir=x", "--out=y", "--dtype=int8"], "--dtype is 'int8'"),
        (["--workdir=x", "--out=y", "--adapters=yes"], "--adapters takes no value"),
        (["--workdir=x", "--out=y"], "is not the work directory of a run"),
    ],
)
def test_a_wrong_export_command_is_one_sentence(flags, message, capsys, tmp_path):
    assert export.main(flags) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_what_cannot_be_exported_is_refused(trained, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    for flags, message in (
        ([f"--out={tmp_path / 'full'}"], "is there already and not empty"),
        ([f"--out={tmp_path / 'out'}", "--adapters"], "trained all weights (config.lora.rank is 0)"),
        ([f"--out={tmp_path / 'out'}", "--checkpoint=7"], "has no checkpoint 7"),
    ):
        assert export.main([f"--workdir={trained}", *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rounded_rollouts_are_corrected_and_logged(rows, model, tmp_path):
    train.train(train.setup(a_config(rows, model, sampling__quantize="int8"), tmp_path / "int8"))
    train.train(train.setup(a_config(rows, model), tmp_path / "plain"))
    rounded, plain = lines_of(tmp_path / "int8"), lines_of(tmp_path / "plain")
    assert 1e-4 < rounded[1]["sampling/logp_difference_mean"] < 0.1 > rounded[1]["sampling/importance_capped_ratio"]
    assert rounded[1]["sampling/importance_weight_mean"] == pytest.approx(1, abs=0.05)
    assert plain[1]["sampling/logp_difference_max"] < 1e-4 and "sampling/importance_weight_mean" not in plain[1]
    # Evaluations use the policy without rounding.
    evaluations = [{k: v for k, v in lines[0].items() if k.startswith("eval/")} for lines in (rounded, plain)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.slow
def test_a_kl_in_the_reward_is_of_the_policy_not_of_its_rounding(rows, model, tmp_path):
    method = {"name": "reinforce_pp", "kl_coef": 0.1}
    run = train.setup(a_config(rows, model, sampling__quantize="int8", method=method), tmp_path / "run")
    seen = {}

    def spy(make_experience):
        def call(groups, state, kl, c_ref):
            seen["kl"] = np.asarray(kl)
            return make_experience(groups, state, kl, c_ref)

        return call

    programs = with_program(run.programs, "make_experience", spy)
    state = supervised.first_state(run.task, run.programs)
    reference = jax.tree.map(jax.numpy.copy, state.params)
    train.train_step(dataclasses.replace(run, programs=programs), state, reference, train.Clock())
    assert np.abs(seen["kl"]).max() < 1e-5  # the reference is the policy


@pytest.mark.slow
def test_a_tokenizer_of_ones_own_stays_in_use(rows, model, tmp_path):
    """With config.data.tokenizer, neither resume nor evaluation nor export uses the tokenizer of the model."""
    own = data.train_tokenizer(["Write 1. ####"] * 5, 270)
    own.save(tmp_path / "own")
    config = a_config(rows, model, data__tokenizer=str(tmp_path / "own"), steps=1)
    train.train(train.setup(config, tmp_path / "run"))
    config.steps = 2
    again = train.setup(config, tmp_path / "run")
    assert again.tokenizer.encode("Write 3.") == own.encode("Write 3.") != data.load_tokenizer(model).encode("Write 3.")
    assert again.tokenizer.eos_ids == own.eos_ids == (2,)
    train.train(again)
    assert evaluate.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'evaluation'}"]) == 0
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) == 0
    found = models.load_pretrained(tmp_path / "out")
    assert found.tokenizer.encode("Write 3.") == own.encode("Write 3.") and found.tokenizer.eos_ids == (2,)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2


def test_prompts_begin_as_the_tokenizer_itself_begins_a_text(rows, model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    content = json.loads((base / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    }
    (base / "tokenizer.json").write_text(json.dumps(content))
    first = lambda name, path, **changes: (
        train.setup(a_config(rows, path, **changes), tmp_path / name).prompts.batch(0).tokens[0].tolist()
    )
    plain, with_bos = first("plain", model), first("with", base)
    assert 1 not in plain and with_bos[0] == 1 and with_bos[1 : len(plain)] == plain[:-1]
    assert first("chat", base, data__chat=True).count(1) == 1  # the template writes the begin token
    assert first("asked", model, data__add_bos=True) == with_bos


def test_an_export_begins_prompts_as_the_run_did(rows, model, tmp_path):
    run = train.setup(a_config(rows, model, data__add_bos=True), tmp_path / "run")
    saver = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints", 1)
    saver.save(1, supervised.first_state(run.task, run.programs))
    saver.close()
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) == 0
    old, new = (json.loads((d / "tokenizer_config.json").read_text()) for d in (model, tmp_path / "out"))
    assert new == old | {"add_bos_token": True} != old
    batch, tokenizer = run.prompts.batch(0), models.load_pretrained(tmp_path / "out").tokenizer
    prompts = [f"{row['question']}\n" for row in batch.rows]
    ids = [tokens[mask].tolist() for tokens, mask in zip(batch.tokens, batch.mask)]
    assert texts.encode_prompts(tokenizer, prompts, None) == ids and ids[0][0] == 1
    assert not data.load_tokenizer(model).adds_bos


def test_adapters_of_other_weights_are_refused(rows, model, adapted, tmp_path):
    config = runs.load_config(adapted, {})
    config.supervised.start_from, config.seed = str(adapted), 5
    run = train.setup(config, tmp_path / "same")
    adapters, frozen = models.lora.split(run.model, supervised.first_state(run.task, run.programs).params)
    jax.tree.map(np.testing.assert_array_equal, frozen, models.load_pretrained(model).params)
    original = train.setup(runs.load_config(adapted, {}), tmp_path / "original")
    original = supervised.first_state(original.task, original.programs)
    expected, _ = models.lora.split(run.model, original.params)
    jax.tree.map(np.testing.assert_array_equal, adapters, expected)
    config.lora.alpha = 3.0
    with pytest.raises(ValueError, match="a run with another config.lora. Its adapters belong to other weights"):
        train.setup(config, tmp_path / "other")


@pytest.mark.slow
def test_adapters_after_a_supervised_phase(rows, model, tmp_path):
    """Both phases train the adapters alone, and the reference is the policy that RL begins with."""
    config = a_config(
        rows, model, lora=Lora(rank=2), supervised__steps=2, supervised__learning_rate=1e-2, update__kl_coefficient=0.1
    )
    train.train(train.setup(config, tmp_path / "run"))
    policy, base = weights_of(tmp_path / "run"), models.load_pretrained(model)
    jax.tree.map(np.testing.assert_array_equal, models.lora.split(policy.config, policy.params)[1], base.params)
    first = lines_of(tmp_path / "run")[1]
    assert abs(first["kl"]) < 1e-6
    merged = models.lora.merge(policy.config, policy.params)
    assert np.abs(merged[1]["layers"]["q"] - base.params["layers"]["q"]).max() > 1e-3


def test_bfloat16_weights_with_a_float32_copy_resume_bit_for_bit(rows, model, tmp_path):
    config = a_config(
        rows,
        model,
        model__param_dtype="bfloat16",
        model__compute_dtype="bfloat16",
        optimizer__float32_master=True,
        optimizer__learning_rate=1e-4,
    )
    train.train(train.setup(config, tmp_path / "whole"))
    config.steps = 1
    train.train(train.setup(config, tmp_path / "half"))
    config.steps = 2
    train.train(train.setup(config, tmp_path / "half"))
    whole, half = weights_of(tmp_path / "whole"), weights_of(tmp_path / "half")
    jax.tree.map(np.testing.assert_array_equal, whole.params, half.params)
    assert str(whole.params["layers"]["q"].dtype) == "bfloat16"


# -- pretrained reward models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    """Writes a sequence classifier in the layout of the hub, with another tokenizer than the policy's."""
    tokenizer = dataclasses.replace(data.train_tokenizer(["Write it ####"], 280), chat_template=CHAT)
    config = ModelConfig(vocab_size=290, width=16, layers=1, heads=2, kv_heads=2, mlp_width=16, qkv_bias=True)
    params = {
        "decoder": reference_decoder.random_params(config, scale=0.3),
        "score": np.random.default_rng(0).normal(size=16).astype(np.float32),
    }
    directory = tmp_path_factory.mktemp("grader") / "model"
    models.save_pretrained(directory, models.RewardModel(config, params, tokenizer))
    return directory


def hero(rows, model, grader, **changes):
    defaults = dict(
        reward=Reward(functions=["tests_reward.py:length", "reward_model"], weights=[1.0, 0.0]),
        reward_model=RewardModel(path=str(grader), system="Grade."),
        method={"name": "hero", "base": "grpo"},
        data__chat=True,
    )
    return a_config(rows, model, **defaults | changes)


def test_a_pretrained_reward_model_scores_the_text_in_its_own_words(rows, model, grader, tmp_path):
    run = train.setup(hero(rows, model, grader), tmp_path / "run")
    state, batch = supervised.first_state(run.task, run.programs), run.prompts.batch(0)
    rollout = run.programs.generate(state.params, batch, state.step)
    score = model_training.scorer(run.reward_phase, state.params, None)
    found, metrics = score(rollout, batch)
    assert metrics == {"rewards/reward_model/too_long_ratio": 0.0}
    judge = models.load_reward_model(grader)
    for p, row in enumerate(batch.rows):
        for g in range(found.shape[1]):
            completion = run.tokenizer.decode(rollout.tokens[p, g][rollout.mask[p, g]].tolist())
            text = f"<bos><system>Grade.<eos><user>{row['question']}<eos><assistant>{completion}<eos>"
            ids = np.array([judge.tokenizer.encode(text)])
            assert found[p, g] == pytest.approx(float(judge.apply(judge.params, ids)[0]), abs=1e-4)
    assert len(set(np.asarray(found).ravel().tolist())) > 4


@pytest.mark.slow
def test_a_run_graded_by_a_pretrained_model_and_its_evaluation(rows, model, grader, tmp_path, capsys):
    train.train(train.setup(hero(rows, model, grader, update__accumulation=2), tmp_path / "run"))
    last = lines_of(tmp_path / "run")[-1]
    assert last["rewards/reward_model/std"] > 0 and last["hero/score_spread"] > 0
    assert last["rewards/reward_model/too_long_ratio"] == 0
    assert evaluate.main([f"--workdir={tmp_path / 'run'}"]) == 0
    record = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert np.isfinite(record["metrics"]["rewards/reward_model"])


def test_a_run_stays_with_the_revision_of_its_reward_model(rows, model, grader, hub_cache, tmp_path):
    files = {path.name: path.read_bytes() for path in grader.iterdir()}
    old = hub_cache("model", "some/grader", files)
    config = hero(rows, model, grader, reward_model__path="some/grader")
    commit = lambda name: train.setup(config, tmp_path / name).reward_phase.pretrained.source["_commit_hash"]
    assert commit("one") == old
    new = hub_cache("model", "some/grader", files | {"README.md": b"new"})
    assert commit("one") == old and commit("other") == new
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    evaluated = lambda c: model_training.open_pretrained(c, mesh, tmp_path / "one").source["_commit_hash"]
    assert evaluated(config) == old
    config.reward_model.path = "some/grader@main"  # another commit than the run's, as named
    assert evaluated(config) == new
    with pytest.raises(config_lib.ConfigError, match="has trained no reward model"):
        export.load_reward_model(tmp_path / "one")


def test_a_text_that_is_too_long_has_no_score_and_is_never_cut(rows, model, grader, tmp_path):
    def scores(limit):
        config = hero(rows, model, grader, reward_model__max_length=limit)
        run = train.setup(config, tmp_path / str(limit))
        state, batch = supervised.first_state(run.task, run.programs), run.prompts.batch(0)
        rollout = run.programs.generate(state.params, batch, state.step)
        score = model_training.scorer(run.reward_phase, state.params, None)
        decode = lambda p, g: run.tokenizer.decode(rollout.tokens[p, g][rollout.mask[p, g]].tolist())
        texts = [[score.text(row, decode(p, g)) for g in range(4)] for p, row in enumerate(batch.rows)]
        lengths = np.array([[len(ids) for ids in tokenizer.encode_batch(group)] for group in texts])
        return *score(rollout, batch), lengths

    tokenizer = data.load_tokenizer(grader)
    whole, _, lengths = scores(2048)
    limit = int(np.median(lengths))
    some, metrics, _ = scores(limit)
    missing = np.isnan(some)
    np.testing.assert_array_equal(missing, lengths > limit)
    assert 0 < missing.mean() < 1 and metrics["rewards/reward_model/too_long_ratio"] == pytest.approx(missing.mean())
    np.testing.assert_allclose(some[~missing], whole[~missing], atol=1e-5)
    none, _, _ = scores(3)
    assert np.isnan(none).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(reward_model__path="no/where"),
            "config.reward_model.path is 'no/where', which has neither a reward_model.json",
        ),
        (dict(reward_model__path="{model}"), "a language model, read by load_pretrained"),
    ],
)
def test_reward_models_that_cannot_be_used_are_refused(changes, message, rows, model, grader, tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    changes = {k: v.replace("{model}", str(model)) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        train.setup(hero(rows, model, grader, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reward_chat_that_refuses_a_completion_is_one_sentence(rows, model, grader, tmp_path, capsys):
    """Set-up tries the template once. Its effect on real completions shows only in the run."""
    other = tmp_path / "grader"
    shutil.copytree(grader, other)
    content = json.loads((other / "tokenizer_config.json").read_text())
    content["chat_template"] = CHAT + "{% if messages[-1].content != '!' %}{{ raise_exception('too odd') }}{% endif %}"
    (other / "tokenizer_config.json").write_text(json.dumps(content))
    path = tmp_path / "recipe.py"
    config = hero(rows, model, other)
    path.write_text(
        f"from jaxrl_reason import config\ndef get_config():\n    return config.from_dict({config_lib.to_dict(config)!r})\n"
    )
    assert train.main([f"--config={path}", f"--workdir={tmp_path / 'run'}"]) == 1
    err = capsys.readouterr().err
    assert "error: The reward model's chat cannot be rendered around a completion: " in err and "too odd" in err


def test_a_damaged_description_of_the_model_is_one_sentence(rows, model, adapted, tmp_path):
    shutil.copytree(adapted, tmp_path / "run")
    config = runs.load_config(tmp_path / "run", {})
    (tmp_path / "run" / "tokenizer" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer/config.json is not JSON"):
        train.setup(config, tmp_path / "run")
    config.supervised.start_from = str(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json is damaged"):
        train.setup(config, tmp_path / "other")


def test_a_pretrained_reward_model_is_not_trained(rows, model, grader, tmp_path, capsys):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from jaxrl_reason import config\n"
        f"def get_config():\n    return config.from_dict({config_lib.to_dict(hero(rows, model, grader))!r})\n"
    )
    assert reward_training.main([f"--config={path}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "names a pretrained reward model, so there is none to train" in capsys.readouterr().err


# -- numbers, from a model that reads text ---------------------------------------------------------------------------


def test_a_pretrained_model_learns_to_write_numbers(model, tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("a,y\n" + "".join(f"{i},{2 * i}\n" for i in range(40)))
    config = tiny(
        file,
        model=Model(path=str(model)),
        data__train_split="[:30]",
        data__eval_split="[30:]",
        max_prompt_length=20,
        max_completion_length=6,
        regression=Regression(tokenizer="p10", target="y", inputs="text"),
        reward=Reward(functions=["heavy_tailed"]),
        method={"name": "genre2", "base": "grpo"},
        supervised__steps=2,
        eval__every=2,
    )
    run = train.setup(config, tmp_path / "run")
    start, base = supervised.first_state(run.task, run.programs).params, models.load_pretrained(model).params
    new = run.model.vocab_size - 310
    assert new == run.tokenizer.pad_id + 1 and start["embedding"].shape == (310 + new, 16)
    np.testing.assert_array_equal(start["embedding"][new:], base["embedding"])
    np.testing.assert_allclose(start["embedding"][:new], np.tile(base["embedding"].mean(axis=0), (new, 1)), atol=1e-6)
    text = data.load_tokenizer(model)
    batch = run.prompts.batch(0)
    assert text.decode(batch.tokens[0][batch.mask[0]][1:] - new).startswith("a ")
    train.train(run)
    last = lines_of(tmp_path / "run")[-1]
    assert last["completions/mean_length"] == 6 and np.isfinite(last["eval/rmse"])
    again = train.setup(config, tmp_path / "run")
    assert again.model == run.model and again.tokenizer.vocab_size == run.tokenizer.vocab_size
    assert evaluate.main([f"--workdir={tmp_path / 'run'}", "--samples=2"]) == 0
    config.regression.inputs = "features"
    with pytest.raises(ValueError, match="config.regression.inputs='text'"):
        train.setup(config, tmp_path / "other")


@pytest.mark.slow
def test_a_trained_reward_model_is_exported(rows, tmp_path, capsys):
    pairs = write_rows(tmp_path / "pairs.jsonl", [row | {"chosen": row["solution"], "rejected": "no"} for row in ROWS])
    config = tiny(
        pairs,
        model__qk_norm=True,
        reward=Reward(functions=["accuracy", "reward_model"], weights=[1.0, 0.0]),
        reward_model=RewardModel(steps=2, batch_size=4),
        method={"name": "hero", "base": "grpo"},
        steps=1,
    )
    train.train(train.setup(config, tmp_path / "run"))
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--reward-model"]) == 0
    assert "The reward model is in" in capsys.readouterr().out
    judge = models.load_reward_model(tmp_path / "out")
    digest = model_training.tokenizer_digest(judge.tokenizer)
    _, params = model_training.load_reward_model(tmp_path / "run" / "reward_model", digest)
    jax.tree.map(np.testing.assert_array_equal, judge.params, params)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["architectures"] == ["Qwen3ForSequenceClassification"] and content["num_labels"] == 1
    assert content["max_position_embeddings"] == config.max_prompt_length + config.max_completion_length
    # Another run can use the export.
    other = tiny(
        pairs, reward=config.reward, method=config.method, reward_model=RewardModel(path=str(tmp_path / "out"))
    )
    assert train.setup(other, tmp_path / "other").reward_phase.pretrained is not None
    assert (
        export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'x'}", "--reward-model", "--adapters"]) == 2
    )
    assert "--reward-model writes the trained reward model" in capsys.readouterr().err
