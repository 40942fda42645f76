"""Retrieval: collections, training of a retriever, its index on disk, search and its measurement."""
