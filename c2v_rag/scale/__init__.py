"""Many machines, or the cores and GPUs of one, by Ray Data: index a corpus, embed to files."""
