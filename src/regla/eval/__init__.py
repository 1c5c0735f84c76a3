"""Scores of trained models (`perplexity`) and their text (`generation`)."""
