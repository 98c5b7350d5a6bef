"""The CUDA C++ kernels, one file per op: sequential work that Triton does not express. No checks here."""

from lacfast.ops.cuda.advantages import advantage_apply, advantage_sums, normalized_advantages
from lacfast.ops.cuda.gae import gae, gae_backward
from lacfast.ops.cuda.smc import effective_sample_size, systematic_resample

__all__ = [
    "advantage_apply",
    "advantage_sums",
    "effective_sample_size",
    "gae",
    "gae_backward",
    "normalized_advantages",
    "systematic_resample",
]
