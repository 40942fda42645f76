"""How fast things are here: `foveate bench kernels`, `decode`, `projections` and `neighborhood`.

A speed is a ratio of runs that alternate in one process, and is only given where the same run's
output, gradients included, agreed with float64. `kernels.run` and `decode.run` are the jobs from
Python; the masks are in `catalogue` (those of the Long-Context Attention Benchmark,
arXiv 2510.17896) and `patterns` (told by their density).
"""
