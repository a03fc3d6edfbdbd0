"""Data sets that need no network: TFDS builders and tables."""
