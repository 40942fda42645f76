"""`foveate inspect`: what attention does in a model, and which pattern each of its heads could run."""
