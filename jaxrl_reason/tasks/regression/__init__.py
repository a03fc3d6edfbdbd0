"""GenRe2's task: predict a number by decoding its digits (arXiv 2512.06533).

    vocabulary.py   Digits, the tokenizer of a regression run
    tables.py       tables of a configuration, with their scales
    rows.py         encoded rows, training batches and evaluation batches
    reward.py       NumberScorer, the rewards of decoded numbers
    evaluation.py   predictions on held-out rows and their metrics
    pointwise.py    a regressor with a mean-squared-error head, for comparison
    opening.py      opens the task of a configuration

The rollout, the update and the training loop serve text problems too. Token ids begin with the number's alphabet; the next id begins
every prompt and is the padding token. If rows enter as text, the ids of the text tokenizer follow.
"""

from jaxrl_reason.tasks.regression.pointwise import pointwise_regressor
from jaxrl_reason.tasks.regression.reward import NumberScorer
from jaxrl_reason.tasks.regression.rows import Stream
from jaxrl_reason.tasks.regression.tables import open_tables, take_values
from jaxrl_reason.tasks.regression.vocabulary import Digits

__all__ = [
    "Digits",
    "NumberScorer",
    "Stream",
    "open_tables",
    "pointwise_regressor",
    "take_values",
]
