"""The kernels; importing one imports Triton."""
