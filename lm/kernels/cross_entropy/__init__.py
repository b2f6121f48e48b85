"""Cross-entropy with the output projection inside: log-probabilities from hidden states."""

from lm.kernels.cross_entropy.choose import (
    IMPLEMENTATIONS,
    MAX_LOGIT_BYTES,
    Implementation,
    token_logprobs,
)
from lm.kernels.cross_entropy.fused import fused_token_logprobs
from lm.kernels.cross_entropy.reference import reference_token_logprobs
from lm.kernels.cross_entropy.structured import structured_token_logprobs

__all__ = [
    "IMPLEMENTATIONS",
    "MAX_LOGIT_BYTES",
    "Implementation",
    "fused_token_logprobs",
    "reference_token_logprobs",
    "structured_token_logprobs",
    "token_logprobs",
]
