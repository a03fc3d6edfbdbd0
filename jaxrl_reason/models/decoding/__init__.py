"""Decoding: groups of completions sampled on the device, token by token, against a shared prompt cache."""
