"""Hidden states × head weight, without the logits: statistics of tokens, and the weighted loss with its gradients.

To read in this order: `linear` (what a head is), `planner` (which rows make a chunk), `rows` (what a chunk is asked
for, by `torch_rows`, `native_rows`, or `triton_rows` with `kernels` and `row_kernels`), then `tokens` and `weighted`,
the two passes with their autograd, and `passes`, which calls them as a batch wants it; `exponentials` is what the
divergence takes from it.
"""
