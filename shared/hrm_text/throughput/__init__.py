"""`hrm-text bench`: the engines side by side, under vLLM's own load generator, beside the floors of the machine."""
