"""Methods: an advantage chain, a policy loss, and the signals that both need, in a dozen lines each.

An estimator is a method by itself. An extension changes an estimator, its `base`; several extensions stack. To add an
estimator, decorate a function with keyword-only parameters. Its name becomes a value of `config.method.name`, and its
parameters become `config.method.*`:

    @register
    def centered_reinforce(*, clip: float = 0.2):
        '''REINFORCE with a group baseline.'''
        return Method(chain(center_by_group()), PolicyLoss(clip_low=clip, clip_high=clip))
"""

# The last two modules register the methods.
from jaxrl_reason.methods import estimators as estimators
from jaxrl_reason.methods import papers as papers
from jaxrl_reason.methods.registry import (
    combine,
    create,
    keywords,
    names,
    nearest,
    register,
    register_extension,
    stack,
    summary,
)
from jaxrl_reason.methods.types import ExpertDigits, Extension, Method, PolicyLoss, SelfReward
