r"""One rule for a fast function with its own backward pass; other derivatives are the plain one's.

Let f be the plain function, differentiable as it is, and F a faster one with the same values and a
hand-written $x' = J_f(x)^T y'$. `differentiable` makes one function of the two whose reverse
derivative is the fast one; forward derivatives, second derivatives and derivatives of the backward
pass are those of f. JAX's own `custom_vjp` would refuse forward mode.

It rests on two linear maps, y' = J x' and x' = J^T y', each the other's transpose.
"""

import functools
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def differentiable(
    plain: Callable,
    forward: Callable,
    backward: Callable,
    one_by_one: bool = False,
    effects: Callable[[], Set] = frozenset,
) -> Callable:
    """Joins a plain function, a faster one and its backward pass.

    Args:
        plain: (x, rest) -> y, one array; x a tree of float arrays, rest a tree without gradients.
        forward: (x, rest) -> (y, kept), the same y and a tree for the backward pass.
        backward: (x, rest, kept, dy) -> dx, a tree like x.
        one_by_one: whether vmap runs the fast functions one after the other, for loops that skip
            work: side by side they would skip only what all of them do.
        effects: JAX effects of the backward pass, asked when it is traced.

    Returns:
        (x, rest) -> (y, kept); no gradient passes through kept. The three functions are compared by
        identity where compiled code is cached: give functions that live as long as the module.
    """
    functions = (plain, _OneByOne(backward) if one_by_one else backward, effects)
    run = jax.custom_batching.sequential_vmap(forward) if one_by_one else forward

    def call(x, rest):
        y, kept = jax.lax.stop_gradient(run(*jax.lax.stop_gradient((x, rest))))
        leaves, tree = jax.tree.flatten((x, rest, kept))
        return _attach(functions, tree, len(jax.tree.leaves(x)), y, *leaves), kept

    return call


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _attach(functions, tree, count, y, *leaves):
    """Gives the value y the derivative of the plain function at the leaves."""
    return y


@_attach.defjvp
def _attach_jvp(functions, tree, count, primals, tangents):
    y, *leaves = primals
    linear = tangents[1 : 1 + count]
    change = _push.bind(
        *leaves, *linear, functions=functions, tree=tree, count=count, out=jax.typeof(y)
    )
    return _attach(functions, tree, count, y, *leaves), change


# Both maps take the leaves of (x, rest, kept), of which `count` are x's, then what they are linear
# in: tangents of x or the cotangent of y.
_push = Primitive("kreg_push_forward")
_pull = Primitive("kreg_pull_back")
_pull.multiple_results = True


def _push_plain(*leaves, functions, tree, count, out):
    plain = functions[0]
    kept, tangents = leaves[:-count], leaves[-count:]
    x, rest, _ = jax.tree.unflatten(tree, kept)
    shape = jax.tree.structure(x)
    return jax.jvp(lambda x: plain(x, rest), (x,), (jax.tree.unflatten(shape, tangents),))[1]


def _pull_plain(*leaves, functions, tree, count, out):
    plain = functions[0]
    x, rest, _ = jax.tree.unflatten(tree, leaves[:-1])
    return jax.tree.leaves(jax.vjp(lambda x: plain(x, rest), x)[1](leaves[-1])[0])


def _pull_fast(*leaves, functions, tree, count, out):
    backward = functions[1]
    return jax.tree.leaves(backward(*jax.tree.unflatten(tree, leaves[:-1]), leaves[-1]))


def _push_shape(*avals, out, **params):
    return out


def _pull_shape(*avals, functions, count, **params):
    return list(avals[:count]), set(functions[2]())


def _push_transpose(dy, *leaves, count, **params):
    fixed, tangents = leaves[:-count], leaves[-count:]
    wanted = [ad.is_undefined_primal(x) for x in tangents]
    if isinstance(dy, ad.Zero):
        return [None] * len(fixed) + [
            ad.Zero(x.aval) if w else None for x, w in zip(tangents, wanted, strict=True)
        ]
    dx = _pull.bind(*fixed, dy, count=count, **params)
    return [None] * len(fixed) + [d if w else None for d, w in zip(dx, wanted, strict=True)]


def _pull_transpose(dx, *leaves, count, **params):
    fixed = leaves[:-1]
    dx = [ad.instantiate_zeros(d) for d in dx]
    return [None] * len(fixed) + [_push.bind(*fixed, *dx, count=count, **params)]


def _jvp(primitive: Primitive, plain: Callable, width: Callable) -> Callable:
    """Differentiates one of the maps: it is linear in the last inputs, and the plain one else."""

    def rule(primals, tangents, **params):
        linear = width(params)
        fixed, last = list(primals[:-linear]), list(primals[-linear:])
        tangents = [ad.instantiate_zeros(t) for t in tangents]
        count = params["count"]
        y = primitive.bind(*primals, **params)
        direct = primitive.bind(*fixed, *tangents[-linear:], **params)

        def of_x(*x):
            return plain(*x, *fixed[count:], *last, **params)

        _, through = jax.jvp(of_x, tuple(fixed[:count]), tuple(tangents[:count]))
        return y, jax.tree.map(jax.numpy.add, direct, through)

    return rule


def _batched(primitive: Primitive) -> Callable:
    def rule(arguments, axes, *, functions, tree, count, out):
        """Maps both functions over the axis and binds the primitive again."""
        size = next(
            x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None
        )
        leading = [
            x if axis is None else jax.numpy.moveaxis(x, axis, 0)
            for x, axis in zip(arguments, axes, strict=True)
        ]
        # Everything that the maps are linear in, and x, gets the axis, so that shapes stay alike.
        split = len(arguments) - (1 if primitive is _pull else count)
        full = [
            jax.numpy.broadcast_to(x, (size, *x.shape))
            if axis is None and (i < count or i >= split)
            else x
            for i, (x, axis) in enumerate(zip(leading, axes, strict=True))
        ]
        mapped = tuple(
            None if axis is None and count <= i < split else 0 for i, axis in enumerate(axes)
        )
        vector = out.update(shape=(size, *out.shape))
        results = primitive.bind(
            *full,
            functions=_Mapped(functions, mapped[:split], tree),
            tree=tree,
            count=count,
            out=vector,
        )
        return results, [0] * len(results) if primitive.multiple_results else 0

    return rule


class _Mapped(tuple):
    """The functions under vmap; equal, for caches, where functions and axes are equal."""

    key: tuple

    def __new__(cls, functions, axes, tree):
        *maps, effects = functions
        self = super().__new__(cls, (*(_over(f, axes) for f in maps), effects))
        self.key = (functions, axes, tree)
        return self

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Mapped) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _over(function: Callable, axes: tuple) -> Callable:
    """Maps over the first axis of those leaves that have one; further arguments all have one."""

    def mapped(*arguments):
        leaves, tree = jax.tree.flatten(arguments)
        places = (*axes[: len(leaves)], *(0,) * (len(leaves) - len(axes)))

        def one(*leaves):
            return function(*jax.tree.unflatten(tree, leaves))

        if not isinstance(function, _OneByOne):
            return jax.vmap(one, places)(*leaves)
        moving = [x for x, at in zip(leaves, places, strict=True) if at is not None]

        def next_one(moved):
            moved = iter(moved)
            return one(
                *(x if at is None else next(moved) for x, at in zip(leaves, places, strict=True))
            )

        return jax.lax.map(next_one, moving)

    return _OneByOne(mapped) if isinstance(function, _OneByOne) else mapped


class _OneByOne(NamedTuple):
    """A function that vmap calls once for each entry."""

    function: Callable

    def __call__(self, *arguments):
        return self.function(*arguments)


_compiled = functools.partial(jax.jit, static_argnames=("functions", "tree", "count", "out"))
_push.def_impl(_compiled(_push_plain))
_pull.def_impl(_compiled(_pull_fast))
_push.def_abstract_eval(_push_shape)
_pull.def_effectful_abstract_eval(_pull_shape)
mlir.register_lowering(_push, mlir.lower_fun(_push_plain, multiple_results=False))
mlir.register_lowering(_pull, mlir.lower_fun(_pull_fast, multiple_results=True))
ad.primitive_jvps[_push] = _jvp(_push, _push_plain, lambda params: params["count"])
ad.primitive_jvps[_pull] = _jvp(_pull, _pull_plain, lambda params: 1)
ad.primitive_transposes[_push] = _push_transpose
ad.primitive_transposes[_pull] = _pull_transpose
batching.primitive_batchers[_push] = _batched(_push)
batching.primitive_batchers[_pull] = _batched(_pull)
