"""Studies: a grid of training runs described by one short YAML file, trained, tabulated and plotted."""

from regla.study.run import study

__all__ = ["study"]
