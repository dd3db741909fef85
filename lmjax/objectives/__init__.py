"""Objectives: a module each, with `make_example` for the host and `loss` for the device."""

from lmjax.objectives import causal_lm

OBJECTIVES = {"causal_lm": causal_lm}
