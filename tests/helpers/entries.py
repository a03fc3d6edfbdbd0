"""Entries of results whose summary and tables tests work out by hand."""


def entry(row, seed, before, after, *, config="c", recipe=False):
    evaluations = [{"step": step, **metrics} for step, metrics in ((0, before), (8, after))]
    given = {"versions": {"jax": "1"}, "seconds": 60.0 + 60 * seed, "start_seconds": 9.0, "changes": {}}
    return {"row": row, "recipe": recipe, "seed": seed, "config": config, **given, "evaluations": evaluations}


def accuracy(x):
    return {"eval/accuracy": x}


ENTRIES = [
    entry("hero", 0, accuracy(0.25) | {"pointwise/r2": 0.5}, accuracy(0.5), recipe=True),
    entry("hero", 1, accuracy(0.35) | {"pointwise/r2": 0.7}, accuracy(0.75) | {"eval/r2": None}, recipe=True),
    entry("plain", 0, accuracy(0.25), accuracy(0.25)),
    entry("plain", 1, accuracy(0.35), accuracy(0.45)),
]
OF_ROW = {"hero": ([0.5, 1.0], [0.75, 1.0]), "plain": ([0.5, 0.0], [0.5, 0.5])}
WITH_PROMPTS = [e | {"accuracies": OF_ROW[e["row"]][e["seed"]], "prompts": "p"} for e in ENTRIES]
