"""Models of others: their config.json, their tensors, their files."""
