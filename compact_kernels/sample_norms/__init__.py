"""Per-rationale gradient norms of a whole model in its one backward pass."""

from compact_kernels.sample_norms.recorder import SampleGradNorms, SampleNorms, sample_grad_norms

__all__ = ["SampleGradNorms", "SampleNorms", "sample_grad_norms"]
