"""Flax NNX modules: they hold parameters and call the functions of kreg."""
