"""One command for a machine with a GPU or a TPU: `python -m experiments.hardware`.

It needs jax >= 0.11.1, flax, optax, orbax-checkpoint, jaxtyping and numpy, and this repository as a
folder (the oracle is in tests/); neither a package index, nor uv, pytest, grain, tyro, beartype or
matplotlib. Four parts, one after the other, each in a process of its own:

contract  what the core promises, on this device, against the float64 NumPy oracle of the tests
kernels   the GPU kernels at stated sparsities beside cuDNN, FlashAttention-2 and AdaSplash-2
timing    kreg's "xla" and "reference" beside `jax.nn.dot_product_attention`, interleaved
queue     the next slice of queue.toml: long in-context runs, which go on where they were stopped

    python -m experiments.hardware                        all of them in 9 minutes
    python -m experiments.hardware timing --budget 5      one of them, in 5
    python -m experiments.hardware pytest                 `pytest -m core` on the device
    python -m experiments.hardware queue --carry FILE     go on from another machine's carry.tar.gz

Everything is written as soon as it is known, below `--out` (runs/hardware): contract.json,
kernels.json, timing.json, queue.json and summary.json, each with device, versions and commit, and
queue/ with the runs. `--results FOLDER` keeps copies of the small files, named after the device,
fit to be committed. What a later session needs of an out folder that will not survive is in
carry.tar.gz.

The exit status is 1 if a check of the contract failed or a part broke; 0 otherwise, also where only
a CPU was found and nothing was done (`--allow-cpu` does it all the same, `--smoke` in tiny sizes).

`expected` in timing.json is what somebody said beforehand that the ratios would be, so that a
measurement can contradict it. It is null until timing.EXPECTED is filled in; never fill it in from
a measurement.
"""
