"""Probes of memory: what is asked (`tokens`, `text`), how it is scored (`score`), and the command (`run`)."""
