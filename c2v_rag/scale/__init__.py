"""Index a corpus, or embed texts to files, with Ray Data on many machines or on all cores and GPUs of one machine."""
