"""GenRe2's task: predict a number by decoding its digits (arXiv 2512.06533).

    vocabulary.py   Digits, the tokenizer of a regression run
    tables.py       tables of a configuration, with their scales; encoded rows, and batches of them
    evaluation.py   NumberScorer, the rewards of decoded numbers; predictions on held-out rows; a regressor to compare
    with opening.py      opens the task of a configuration

The rollout, the update and the training loop serve text problems too. Token ids begin with the number's alphabet; the
next id begins every prompt and is the padding token. If rows enter as text, the ids of the text tokenizer follow.
"""

from jaxrl_reason.tasks.regression.evaluation import NumberScorer, pointwise_regressor
from jaxrl_reason.tasks.regression.tables import open_tables, Stream, take_values
from jaxrl_reason.tasks.regression.vocabulary import Digits
