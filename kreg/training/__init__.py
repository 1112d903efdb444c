"""Optax steps, Orbax checkpoints, Grain data: the loop that trains kreg.nn models."""
