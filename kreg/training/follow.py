"""Taking the steps of one run, or of several in one program, until they are done or stopped."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from kreg.training.course import Course
from kreg.training.data import Batch
from kreg.training.state import TrainState
from kreg.training.stopping import Stopping

# (states, batches, which of the courses) -> (states, metrics)
type Update = Callable[[Any, Any, list[int]], tuple[Any, dict]]


class Bundling(NamedTuple):
    """How several runs become one pytree, and one of them comes out of it again."""

    states: Callable[[Sequence[TrainState]], TrainState]
    batches: Callable[[Sequence[Batch]], Batch]
    take: Callable[[PyTree, int], PyTree]


ALONE = Bundling(lambda states: states[0], lambda batches: batches[0], lambda tree, place: tree)
# Batches come from the host, and are put on the device by the program that takes them.
STACKED = Bundling(
    states=lambda states: jax.tree.map(lambda *leaves: jnp.stack(leaves), *states),
    batches=lambda batches: jax.tree.map(lambda *leaves: np.stack(leaves), *batches),
    take=lambda tree, place: jax.tree.map(lambda leaf: leaf[place], tree),
)


def follow(
    courses: Sequence[Course],
    states: Sequence[TrainState],
    update: Update,
    stopping: Stopping,
    bundling: Bundling,
) -> tuple[list[TrainState], str | None]:
    """Take steps until all courses are at their ends or there is a reason to stop.

    A kill may have left them at different steps. Those behind go first, until they are level with
    the next: so all that go together are at one step, and their batches have one shape.
    """
    states, stopped_by = list(states), None
    with ExitStack() as open_courses:
        for course in courses:
            open_courses.enter_context(course.begun())
        while stopped_by is None and any(course.going for course in courses):
            behind, until = _next_stretch(
                [course.step for course in courses], courses[0].plan.steps
            )
            company = [courses[i] for i in behind]
            together = bundling.states([states[i] for i in behind])
            for course in company:
                course.share(len(company))
            while stopped_by is None and company[0].step < until:
                batch = bundling.batches([next(course.data) for course in company])
                together, metrics = update(together, batch, behind)
                stopped_by = _after_step(
                    company,
                    [partial(bundling.take, together, place) for place in range(len(company))],
                    [partial(bundling.take, metrics, place) for place in range(len(company))],
                    stopping,
                )
            for place, i in enumerate(behind):
                states[i] = bundling.take(together, place)
    # A reason that came with the last step, or after it.
    return states, stopped_by or stopping.agreed()


def _next_stretch(steps: Sequence[int], last: int) -> tuple[list[int], int]:
    """Find who is furthest behind, and the step at which another is.

    >>> _next_stretch([8, 4, 4], last=12), _next_stretch([8, 8, 8], last=12)
    (([1, 2], 8), ([0, 1, 2], 12))
    """
    least = min(steps)
    ahead = [step for step in steps if step > least]
    return [i for i, step in enumerate(steps) if step == least], min([*ahead, last])


def _after_step(
    company: Sequence[Course],
    states: Sequence[Callable[[], TrainState]],
    metrics: Sequence[Callable[[], dict]],
    stopping: Stopping,
) -> str | None:
    """Log, evaluate and save where it is due; return why to stop, if there is a reason.

    All of one kind before the next, so that nobody's evaluation counts as another's step.
    """
    for course, found in zip(company, metrics, strict=True):
        course.log(found)
    rested = [course.evaluate(state) for course, state in zip(company, states, strict=True)]
    stopped_by = stopping.agreed()
    saved = [
        course.save(state, stopped_by is not None)
        for course, state in zip(company, states, strict=True)
    ]
    if any((*rested, *saved)):
        for course in company:
            course.rested()
    return stopped_by
