"""One training step on the device: sampling, rewards in, advantages, losses, update."""
