"""Evaluation: folders of retrieval and similarity data through mteb, against baselines, with intervals."""
