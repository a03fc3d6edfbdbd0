"""Tests plans of a step for 8 simulated devices, and for TPUs if libtpu is installed."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

from hypothesis import given
from hypothesis import strategies as st
import jax
import pytest

from helpers.tiny_runs import tiny
from jaxrl_reason import config as config_lib
from jaxrl_reason import data, models
from jaxrl_reason.config import ConfigError, to_dict
from jaxrl_reason.models import reward_model
from jaxrl_reason.plan import costs, measure
from jaxrl_reason.plan.__main__ import main
from jaxrl_reason.plan.chips import Chip
from jaxrl_reason.plan.lengths import skewed_lengths
from jaxrl_reason.plan.measure import GIB, largest_that_fits, make_plan, measure_part, requested_bytes
from jaxrl_reason.plan.programs import Part, parts_of
from jaxrl_reason.plan.step import open_step, sizes_of
from jaxrl_reason.rl.devices import update_sizes

WITH_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)


# -- broken on purpose -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(shared_programs):
    """Returns the output of sharded_programs.py, run in a process with 8 devices."""

    def of(*broken):
        script = pathlib.Path(__file__).with_name("sharded_programs.py")
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
        run = subprocess.run([sys.executable, str(script), *broken], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        return json.loads(run.stdout)

    return of


def assert_sound(found):
    """Asserts that caches are split and not moved by collectives, and that the update overwrites its state."""
    assert found["caches"] == {"split": True, "whole": False}
    gathered = found["rollout"]["collectives"]["all-gather"]["gib"] * GIB
    caches = sum(x for name, x in found["rollout"]["filled_gib"].items() if "KV" in name) * GIB
    assert gathered < caches  # in the whole rollout; with replicated caches, every step gathers all caches
    assert found["update"]["donation"] == 1.0


@pytest.mark.processes
def test_a_step_is_sharded_and_donated_and_its_flops_equal_the_compilers(sharded):
    found = sharded()
    assert_sound(found)
    assert abs(found["rollout"]["flops_over_hlo"] - 1) < 0.03 and abs(found["update"]["flops_over_hlo"] - 1) < 0.03
    # By hand in float32: 2 layers, keys and values, 2 of 4 heads of size 4. A device has 4 of 16 prompts of 64 tokens.
    # Each prompt has 4 samples of 192 tokens.
    per_token = 2 * 2 * 2 * 4 * 4
    filled = found["rollout"]["filled_gib"]
    assert filled["prompts' KV"] * GIB == per_token * 4 * 64
    assert filled["samples' KV"] * GIB == per_token * 4 * 4 * 192
    assert found["reshard"]["collectives"]["all-gather"]["count"] > 0
    assert found["refused"].startswith(
        "config.supervised.batch_size is 6, which mesh.slice x mesh.data x mesh.fsdp = 4 devices"
    )


@pytest.mark.processes
@pytest.mark.parametrize("broken", ["replicated", pytest.param("undonated", marks=pytest.mark.slow)])
def test_a_broken_step_is_detected(broken, sharded):
    with pytest.raises(AssertionError):
        assert_sound(sharded(broken))


# -- the search ------------------------------------------------------------------------------------


@given(limit=st.integers(0, 5000), start=st.integers(1, 3000), grain=st.sampled_from([1, 2, 8, 128]))
def test_the_search_returns_the_largest_size_or_one_at_most_a_sixteenth_smaller(limit, start, grain):
    found = largest_that_fits(lambda n: n <= limit, start, grain)
    lowest = 2 if grain == 1 else grain
    if limit < lowest:
        assert found == (start if start <= limit else 0)
    else:
        assert found <= limit < found + max(grain, found // 16) + grain and found % grain == 0


def test_the_planned_update_has_the_log_probabilities_of_a_reward_with_kl():
    """KL in the reward, not in the loss: the run scores under the reference policy too, and in bfloat16 once more."""
    method = {"name": "reinforce_pp", "kl_coef": 0.1}
    for dtype, again in (("float32", False), ("bfloat16", True)):
        config = tiny("rows.jsonl", method=method, model__compute_dtype=dtype)
        step = open_step(config, jax.devices()[:1])
        assert step.experience.ref_logprobs is not None
        assert (step.experience.old_logprobs is not None) == again == step.programs.needs.old_logprobs


def test_tokens_of_waves_that_a_run_refuses_a_plan_refuses_too():
    with pytest.raises(ConfigError, match="config.update.wave_tokens is 64, and updates of this run have one length"):
        make_plan(tiny("rows.jsonl", update__wave_tokens=64), "v5e:1x1", jax.devices()[:1])


def test_a_mean_length_leaves_out_times_and_ratios_of_full_lengths():
    """A product of two 8 x 8 matrices has 1,024 FLOPs, and the formula of short completions half of them."""
    square = jax.ShapeDtypeStruct((8, 8), "float32")
    part = Part("score", lambda: jax.jit(lambda a, b: a @ b).lower(square, square), costs.Cost(512.0), 0.0, 0.0, {})
    chip = Chip(hbm=1.0, flops=1e9, bandwidth=1e9, links=1e9)
    full, short = (measure_part(part, chip, 1, full=full) for full in (True, False))
    assert full["flops_over_hlo"] == 0.5 and set(full["roofline_seconds"]) == {"compute", "memory", "links"}
    assert short["flops_over_hlo"] is None and set(short["roofline_seconds"]) == {"compute", "memory"}


def test_requested_bytes_are_read_from_the_compilers_error():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. "
        "Exceeded hbm capacity by 4.75G."
    )
    assert requested_bytes(RuntimeError(text)) == 20.5 * 2**30
    text = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.96G) exceeds available HBM (15.75G)."
    assert requested_bytes(RuntimeError(text)) == 33.96 * 2**30
    assert requested_bytes(RuntimeError("INTERNAL: something else")) is None


# -- errors ----------------------------------------------------------------------------------------


def recipe(tmp_path, **changes):
    config = tiny("rows.jsonl", **changes)
    path = tmp_path / "recipe.py"
    path.write_text(
        "from jaxrl_reason.config import Config, from_dict\n"
        f"def get_config():\n    return from_dict({to_dict(config)!r})\n"
    )
    return path


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--topology=v5e"], "such as v5e:4x4"),
        (["--topology=v9:4x4"], "Generations are v2, v3, v4, v5e, v5p, v6e, tpu7x"),
        ([], "--topology=NAME is missing"),
        (["--topology=v5e:2x2", "--slices=none"], "--slices=none: expected a number"),
        (["--topology=v5e:2x2", "--mean-length=abc"], "--mean-length=abc: expected a number"),
        (["--topology=v5e:2x2", "--mean-length=0"], "--mean-length is 0; it must be between 1 and"),
        (["--topology=v5e:2x2", "--mean-length=99999"], "--mean-length is 99999; it must be between 1 and"),
        (["--topology", "v9:4x4"], "--topology is 'v9:4x4'"),
        (["--topology"], "--topology needs a value"),
    ],
)
def test_invalid_flags_exit_with_2_and_a_sentence(flags, said, tmp_path, capsys):
    assert main([f"--config={recipe(tmp_path)}", f"--out={tmp_path / 'plan.json'}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and not (tmp_path / "plan.json").exists()


def test_the_costs_of_a_mean_length_are_those_of_skewed_completions():
    sizes = dict(prompts_per_step=4, group_size=4, max_prompt_length=64, max_completion_length=256)
    config = tiny("rows.jsonl", **sizes, update__kl_coefficient=0.1)
    devices = jax.devices()[:1]
    full, short = ({part.name: part for part in parts_of(config, devices, mean)} for mean in (None, 64))
    assert full.keys() == short.keys() >= {"rollout", "score", "update"}
    step, completions = open_step(config, devices), skewed_lengths(4, 4, 256, 64)
    waves = update_sizes(step.model, config, step.mesh)
    assert waves["lengths"] == 3
    of_update = dict(completions=completions, copies=1, **waves)
    assert short["update"].cost == costs.update(step.model, 4, 4, 64, 256, **of_update)
    assert short["score"].cost == costs.score(step.model, 4, 4, 64, 256, completions=completions, **waves)
    for name in ("rollout", "score", "update"):
        assert short[name].cost.flops < 0.6 * full[name].cost.flops


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(mesh__fsdp=2, mesh__tensor=4, prompts_per_step=3), "^config.prompts_per_step is 3, .* = 2 devices"),
        (
            dict(mesh__fsdp=2, mesh__tensor=4, mesh__rollout_tensor=1, prompts_per_step=2),
            "^With config.mesh.rollout_tensor=1 the mesh that samples is data=8, tensor=1, and for this mesh prompts_per_step .* is 2",
        ),
        (
            dict(mesh__fsdp=8, mesh__rollout_tensor=8),
            "^With config.mesh.rollout_tensor=8 the mesh that samples is data=1, tensor=8, .* mesh.tensor is 8, which does not divide the model's 'vocab' dimension .300.",
        ),
        (
            dict(mesh__tensor=8, mesh__fsdp=1),
            "^config.mesh.tensor is 8, which does not divide the model's 'vocab' dimension .300.",
        ),
    ],
)
def test_a_size_that_the_mesh_does_not_divide_is_named_by_its_field(changes, said):
    config = tiny("rows.jsonl", **dict(prompts_per_step=8, model__heads=4, model__kv_heads=4) | changes)
    with pytest.raises(ConfigError, match=said):
        parts_of(config, jax.devices()[:1] * 8)


def test_sizes_of_a_reward_model_trained_here_come_from_its_description(tmp_path):
    small = models.ModelConfig(vocab_size=300, width=8, layers=3, heads=2, kv_heads=1, mlp_width=24, head_dim=4)
    digest = {"tokenizer_digest": "of a tokenizer that a plan does not read"}
    (tmp_path / "reward_model.json").write_text(json.dumps({"model": dataclasses.asdict(small)} | digest))
    learnt = dict(reward__functions=["accuracy", "reward_model"], reward_model__path=str(tmp_path))
    config = tiny("rows.jsonl", model__width=32, **learnt)
    policy, judge = sizes_of(config)
    assert (policy.width, judge) == (32, small)
    (part,) = (part for part in parts_of(config, jax.devices()[:1]) if part.name == "reward model")
    assert part.contents["weights"] == 4 * sum(x.size for x in jax.tree.leaves(reward_model.abstract_params(small)))
    (tmp_path / "reward_model.json").write_text("{}")
    with pytest.raises(
        ConfigError, match="A plan needs the sizes .*reward_model.json does not describe a reward model"
    ):
        sizes_of(config)


def test_a_new_model_has_the_vocabulary_of_a_tokenizer_that_is_named(tmp_path):
    assert sizes_of(tiny("rows.jsonl", data__vocab_size=400))[0].vocab_size == 400
    data.train_tokenizer(["1 + 1 = 2"], 270).save(tmp_path / "tokenizer")
    size = data.load_tokenizer(tmp_path / "tokenizer").vocab_size
    for named in (dict(data__tokenizer=str(tmp_path / "tokenizer")), dict(supervised__start_from=str(tmp_path))):
        assert sizes_of(tiny("rows.jsonl", data__vocab_size=400, **named))[0].vocab_size == size != 400
    with pytest.raises(ConfigError, match="A plan needs the sizes"):
        sizes_of(tiny("rows.jsonl", data__tokenizer=str(tmp_path / "none")))


def test_the_search_shortens_the_penalty_on_length_with_the_completions(monkeypatch):
    """Without it, DAPO's configuration would be refused at the first smaller length."""
    method = {"name": "dapo", "overlong_max_length": 1024, "overlong_cache_length": 256}
    config = tiny("rows.jsonl", prompts_per_step=4, group_size=4, max_completion_length=1024, method=method)
    tokens = lambda c: c.prompts_per_step * c.group_size * c.max_completion_length
    monkeypatch.setattr(
        measure,
        "parts_of",
        lambda c, devices: config_lib.validate(c) and [types.SimpleNamespace(name="update", config=c)],
    )
    monkeypatch.setattr(measure, "measure_part", lambda part, *_: {"fits": tokens(part.config) <= tokens(config) // 8})
    assert measure.find_largest(config, "v5e:2x2", jax.devices()[:1])["max_completion_length"] == 128


def test_an_invalid_out_path_exits_before_anything_is_compiled(tmp_path, capsys):
    flags = [f"--config={recipe(tmp_path)}", "--topology=v5e:2x2"]
    for out in (tmp_path / "nowhere" / "plan.json", tmp_path):
        assert main([*flags, f"--out={out}"]) == 2
        assert f"--out is '{out}'" in capsys.readouterr().err


def test_without_libtpu_the_error_names_the_package(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a))
    assert main([f"--config={recipe(tmp_path)}", "--topology=v5e:2x2"]) == 2
    assert "jaxrl_reason[tpu]" in capsys.readouterr().err


# -- for TPUs --------------------------------------------------------------------------------------


def command(tmp_path, config, *flags):
    """Returns (standard output, JSON) of the command in a new process, so that this process does not load libtpu."""
    out = tmp_path / "plan.json"
    arguments = ["--config", str(recipe(tmp_path, **config)), f"--out={out}", *flags]
    run = subprocess.run(
        [sys.executable, "-m", "jaxrl_reason.plan", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout, json.loads(out.read_text())


SMALL = dict(
    prompts_per_step=32,
    group_size=8,
    max_prompt_length=128,
    max_completion_length=256,
    model__width=256,
    model__heads=8,
    model__kv_heads=4,
    model__layers=2,
    model__mlp_width=512,
    model__param_dtype="bfloat16",
    model__compute_dtype="bfloat16",
    optimizer__float32_master=True,
    data__vocab_size=4096,
    update__accumulation=2,
    mesh__tensor=2,
)


@WITH_LIBTPU
@pytest.mark.slow
def test_a_step_is_planned_for_a_slice(tmp_path):
    hero = dict(method={"name": "hero"}, reward__functions=["accuracy", "reward_model"], reward__weights=[1.0, 0.0])
    printed, found = command(tmp_path, SMALL | hero, "--topology=v5e:2x4")
    assert "It fits." in printed and found["fits"] and found["devices"] == 8
    assert found["mesh"] == {"slice": 1, "data": 1, "fsdp": 4, "tensor": 2, "rollout_tensor": 0}
    assert (found["attention"], found["remat"]) == ("splash", "layer")
    assert "Attention: splash. The backward pass computes again (remat): layer." in printed
    host = found["host"]
    assert host["chips"] == 8 and host["checkpoint_gib_at_most"] == 2 * host["state_gib"]
    assert f"A checkpoint has {host['state_gib']:.2f} GiB per host of 8 chips." in printed
    parts = {part["name"]: part for part in found["parts"]}
    assert list(parts) == ["reshard", "rollout", "reward model", "update"]
    for name in ("rollout", "reward model", "update"):
        part = parts[name]
        assert abs(part["flops_over_hlo"] - 1) < 0.03 and part["flops_in_kernels"] > 0, name
        assert 0 < part["peak_gib"] < part["total_gib"] < 15.75 and part["bound_by"] in part["roofline_seconds"]
    assert parts["update"]["donation"] > 0.99
    # Devices exchange logits split by the vocabulary for whole rows. The head does not move.
    head, trips = 256 * 4096 * 2, 255
    assert parts["rollout"]["collectives"]["all-gather"]["gib"] * GIB < 0.05 * head * trips
    assert found["step"]["seconds_at_least"] == pytest.approx(sum(p["seconds"] * p["times"] for p in found["parts"]))


@WITH_LIBTPU
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v2:2x2", "v3:2x2"])
def test_a_step_is_planned_for_old_chips(topology, tmp_path):
    _, found = command(tmp_path, SMALL, f"--topology={topology}")
    assert found["fits"] and found["devices"] == 8
    for part in found["parts"]:
        assert part["name"] == "reshard" or abs(part["flops_over_hlo"] - 1) < 0.03 and not part["flops_in_kernels"]


@WITH_LIBTPU
@pytest.mark.slow
def test_a_run_that_does_not_fit_is_planned_and_the_search_finds_sizes_that_do(tmp_path):
    large = SMALL | dict(max_completion_length=131072, mesh__tensor=1, model__head_dim=128)
    printed, found = command(tmp_path, large, "--topology=v5e:2x2", "--search")
    assert not found["fits"] and "does NOT fit" in printed
    refused = [part for part in found["parts"] if not part["fits"]]
    assert refused and all(part["total_gib"] > 15.75 for part in refused)
    assert found["largest"]["max_completion_length"] < 131072
