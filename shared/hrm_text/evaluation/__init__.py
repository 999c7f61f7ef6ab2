"""The paper's benchmarks by the model authors' protocol: rows, prompts, scores, and the run over them."""
