"""`foveate inspect`: what attention does in a model, and which pattern each head could run."""
