"""Recommending: data in published formats, full-ranking metrics, training, answers with reasons."""
