"""Many ranks: a context split over them, attention and FFN apart, experts, a latent in slices.

A rank is one process of `torch.distributed` (gloo on CPUs, NCCL on GPUs). Lower floors never import
this one: what needs ranks takes a process group.
"""
