"""The demo checkpoint: its generated data, tokenizer, training and evaluation."""
