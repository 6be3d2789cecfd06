"""rlhf_fast: fused kernels and a lean training loop for preference learning."""

from rlhf_fast.backends import BackendError, use_backend
from rlhf_fast.ops.token_logprobs import token_logprobs

__version__ = "0.1.0"
__all__ = ["BackendError", "token_logprobs", "use_backend"]
