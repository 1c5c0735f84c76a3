"""Figures for readers: `plots` from measurements, `tables` and `readme` from the committed rows under benchmarks/."""
