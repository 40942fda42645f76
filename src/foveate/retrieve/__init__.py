"""Retrieval: collections, a retriever and its training, its index on disk, search, measures."""
