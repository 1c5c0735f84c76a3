"""Text and tokens: sources, the embedded text, held-out parts, tokenizers."""
