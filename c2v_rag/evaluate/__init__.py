"""Evaluation: retrieval and similarity sets in folders, and the baselines to compare with."""
