"""rlhf_fast: fused kernels and a lean training loop for preference learning."""

from rlhf_fast.backends import BackendError, use_backend
from rlhf_fast.ops.linear_logprobs import linear_logprobs
from rlhf_fast.ops.token_logprobs import token_logprobs

__version__ = "0.1.0"
__all__ = ["BackendError", "linear_logprobs", "token_logprobs", "use_backend"]
