"""What the experiments share: the folder of a run, sweeps that go on, results, the command.

An experiment is an `Experiment` (experiment.py): its presets, a task to train, a table, a figure.
"""
