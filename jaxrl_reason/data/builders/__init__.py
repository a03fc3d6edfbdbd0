"""TFDS builders of data sets that need no network. Their names, versions and rows are fixed: checkpoints depend on them."""
