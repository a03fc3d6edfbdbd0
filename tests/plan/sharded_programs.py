"""Prints the plan of a tiny step on 8 simulated devices as JSON.

test_plan.py runs `python sharded_programs.py [replicated | undonated]`, because a process has one number of devices.
"replicated" puts all KV caches on every device. "undonated" keeps the update's old state. Tests detect both.
"""

import json
import pathlib
import sys

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from helpers.tiny_runs import change, tiny
from jaxrl_reason import models
from jaxrl_reason.config import ConfigError
from jaxrl_reason.plan.chips import CHIPS
from jaxrl_reason.plan.measure import measure_part
from jaxrl_reason.plan.programs import parts_of
from jaxrl_reason.plan.step import open_step
from jaxrl_reason.rl import programs

config = tiny(
    "rows.jsonl",
    prompts_per_step=16,
    max_prompt_length=64,
    max_completion_length=192,
    model__attention="plain",  # other attention has loops whose trips depend on data
    model__heads=4,
    model__kv_heads=4,
    model__layers=2,
    mesh__data=2,
    mesh__fsdp=2,
    mesh__tensor=2,
    mesh__rollout_tensor=2,
)
if "replicated" in sys.argv:
    step, whole = models.Decoder.step, jax.sharding.PartitionSpec()

    def everywhere(*args):
        hidden, cache = step(*args)
        return hidden, jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), cache)

    models.Decoder.step = everywhere
if "undonated" in sys.argv:
    build = programs.build

    def without_donation(*args, **keywords):
        built = build(*args, **keywords)
        built.jitted["update"] = jax.jit(built.jitted["update"].__wrapped__)
        return built

    programs.build = without_donation
found = {}
for part in parts_of(config, jax.devices()):
    found[part.name] = measure_part(part, CHIPS["v5e"], len(jax.devices()))
    if part.name == "rollout":  # pieces of the cache, [P, G, heads, head_dim, T / 2]
        text = part.lower().compile().as_text()
        found["caches"] = {"whole": "f32[16,4,4,4,96]" in text, "split": "f32[4,4,2,4,96]" in text}
try:
    open_step(change(config, supervised__steps=1, supervised__batch_size=6), jax.devices())
except ConfigError as e:
    found["refused"] = str(e)
print(json.dumps(found))
