"""Reinforcement learning that teaches language models to reason, in JAX, for TPUs.

Commands, each with --help; python -m jaxrl_reason lists them:
  train, evaluate, generate, compare, export, report, replay, bench, plan, reward_training

Mathematics, arrays in and arrays out:
  advantages, losses, metrics    methods/ combines them: estimators and the five papers

Rooms, each imports only from rooms above it:
  data/     rows and tokens             models/   one decoder, its sharding, formats of others
  config/   fields, rules, flags        rl/       one step on the device
  runs/     files, checkpoints, loop    rewards/  completions in, numbers out
  tasks/    what is learnt              plan/     a run on a TPU slice that is not there

The run, from top to bottom, is in train.py.
"""

__version__ = "0.2.0.dev0"
