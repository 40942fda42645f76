"""Backends: implementations of the core op, each with its reasons for what it can't run."""
