"""GenRe2's task: predict a number by decoding its digits (arXiv 2512.06533). `opening` opens it.

`tables` encodes rows in batches; `evaluation` has rewards and predictions of held-out rows; `pointwise` has regressors
to compare with. The rollout, the update and the training loop serve text problems too. Token ids (`vocabulary`) begin with the
number's alphabet; the next id begins every prompt and is the padding token. If rows enter as text, the ids of the text
tokenizer follow.
"""

from jaxrl_reason.tasks.regression.evaluation import NumberScorer
from jaxrl_reason.tasks.regression.pointwise import pointwise_regressor
from jaxrl_reason.tasks.regression.tables import open_tables, Stream, take_values, warn_of_repeats
from jaxrl_reason.tasks.regression.vocabulary import Digits
