"""Reinforcement learning that teaches language models to reason, in JAX, for TPUs."""
