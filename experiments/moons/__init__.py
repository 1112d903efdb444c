"""Three Moons: heads that predict one moon each need not wait for the whole system to repeat.

Follows Zhang et al., `Memory Mosaics <https://arxiv.org/abs/2405.06394>`_, 2024.
"""
