"""Text to batches: corpora -> tokenizer -> mixture (counted in tokens) -> loader (chapter 9)."""
