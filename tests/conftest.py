"""Settings of every test: CPU JAX that compiles fast, strict rank promotion, core doctests."""

import gc
import itertools
import os
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling. `make nightly` compiles as users do.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
# Warpgroups that are interpreted wait for each other, each in a thread of a pool that has one for
# every core: on two cores they may wait for ever. XLA reads the size of the pool from here.
os.environ["NPROC"] = "16"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# For what runs on a mesh; everything else runs on the first of them.
jax.config.update("jax_num_cpu_devices", 8)

CORE = Path(__file__).resolve().parent.parent / "kreg"
# Every compiled program takes a few mappings of memory, of which Linux gives a process 65,530; the
# compiler dies without a word when they are used up.
MAPPINGS, MOST_MAPPINGS = Path("/proc/self/maps"), 30_000
finished = itertools.count(1)


def pytest_addoption(parser):
    about = "of each test one case; few: also those with a value that is new to their file"
    parser.addoption("--cases", choices=("one", "few", "all"), default="all", help=about)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """The examples of the pure core belong to the core, too; --cases thins out what -m leaves.

    What is for the night is slow.
    """
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")
        if item.path.parent == CORE:
            item.add_marker(pytest.mark.core)
    yield  # here -m takes its choice
    if (cases := config.getoption("cases")) != "all":
        taken = list(chosen(items, one=cases == "one"))
        config.hook.pytest_deselected(items=[item for item in items if item not in taken])
        items[:] = taken


def chosen(items, one):
    """What CI has time for: every test, every value of its parameters, not every product of them.

    Two jax differ in what they offer and lower, not in arithmetic: there one case will do.
    """
    tests, seen = set(), set()
    for item in items:
        test, _, values = item.nodeid.partition("[")
        values = {(item.path, value) for value in re.split("[-@]", values.removesuffix("]"))}
        if test not in tests or (values - seen and not one):
            seen |= values
            yield item
        tests.add(test)


def pytest_collection_finish():
    """What is imported stays. Looking for garbage every 700 objects is a twentieth of the time."""
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_runtest_logfinish():
    """Drop compiled programs before there are too many of them; to count them takes a while."""
    if next(finished) % 10 or not MAPPINGS.exists():
        return
    if MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)
