"""Log-probabilities of target tokens, with the projection onto the vocabulary."""

from lm.kernels.cross_entropy.choose import IMPLEMENTATIONS, MAX_LOGIT_BYTES, token_logprobs
from lm.kernels.cross_entropy.reference import reference_token_logprobs

__all__ = ["IMPLEMENTATIONS", "MAX_LOGIT_BYTES", "reference_token_logprobs", "token_logprobs"]
