"""Floating-point operations of a traced step, counted in its jaxpr.

Matrix products alone are counted (two for each multiplication), each as often as the loops around
it run; what else a step does is small beside them. Kernels say theirs in Pallas's own
`cost_estimate`. Where nothing is known (a loop of unknown length, a kernel that says nothing) the
body counts once, or not at all. Attention counts the pairs that a whole row sees: rows of one
example each need no less, and a time made of the count is a bound for them. Kernels skip what
packed examples do not see of each other, so rows of many may need less.
"""

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def flops(jaxpr: Jaxpr) -> int:
    """Of all devices together."""
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation)
    if name == "pallas_call":
        estimate = params["cost_estimate"]
        return 0 if estimate is None else estimate.flops
    if name.startswith("dot_product_attention"):
        return _cudnn(equation)
    inner = [flops(body) for body in _bodies(params)]
    if name == "cond":
        return min(inner)
    return _times(equation) * sum(inner)


def _times(equation: Any) -> int:
    """How often the bodies of an equation run, over all devices."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":  # its body is one device's share
        mesh, split = equation.params["mesh"], equation.params["newly_manual_axes"]
        return math.prod(mesh.shape[axis] for axis in split)
    return 1


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(left[i] for i in contracted) * math.prod(equation.outvars[0].aval.shape)


def _cudnn(equation: Any) -> int:
    """cuDNN's causal attention [B, T, H, D]: two products of a triangle forward, five backward."""
    q, k = (v.aval.shape for v in equation.invars[:2])
    B, T, H, D = q
    pairs = T * (T + 1) // 2 if k[1] == T else T * k[1]
    return (5 if "bwd" in equation.primitive.name else 2) * 2 * B * H * D * pairs


def _bodies(params: dict[str, Any]) -> list[Jaxpr]:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr)
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if _is_jaxpr(leaf)]


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)
