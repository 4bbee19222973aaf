"""The emitter: every Pallas-Triton import and compiler parameter of the kernels stands here.

Pallas-Triton is the only Pallas route to ROCm, and JAX 0.11 deprecates it; when it goes, this file
is what has to be written again. On the CPU the same kernels run in Pallas's interpreter, where
`exp2` is jax.numpy's.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib.mlir.dialects import math
from jax._src.lib.triton import dialect as triton_dialect
from jax._src.pallas.triton import lowering
from jax.core import ShapedArray
from jax.experimental import pallas
from jax.experimental.pallas import triton
from jax.extend.core import Primitive
from jax.interpreters import mlir

from mud_puppy.kernels import target

BlockSpec = pallas.BlockSpec
ds = pallas.ds
program_id = pallas.program_id
num_programs = pallas.num_programs
multiple_of = pallas.multiple_of
when = pallas.when
load = triton.load
store = triton.store


def call(
    kernel: Callable,
    *,
    grid: tuple[int, ...],
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    name: str,
) -> Callable[..., Any]:
    """`pallas_call` for the current target: arrays -> arrays of `out_shape`.

    `num_warps` is in warps of 32 threads on NVIDIA and RDNA, of 64 on CDNA. The grid has at most
    three dimensions; the first is the fastest. `name` is the kernel's in profiles and binaries.
    """
    platform = target.current().platform
    renamed = functools.wraps(kernel)(lambda *refs: kernel(*refs))
    # The lowering takes the binary's symbol from the function's name.
    renamed.__name__ = renamed.__qualname__ = name
    run = pallas.pallas_call(
        renamed,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=platform == "cpu",
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        name=name,
    )
    return run


def dot(a: Any, b: Any, *, trans_a: bool = False, trans_b: bool = False) -> Any:
    """a @ b of two tiles of one dtype, summed in float32 (int8 in int32); float32 is not tf32."""
    dims = (((0 if trans_a else 1,), (1 if trans_b else 0,)), ((), ()))
    floating = jnp.issubdtype(a.dtype, jnp.floating)
    if floating and target.current().platform == "cpu":
        # The same products: XLA's CPU has no bfloat16 x bfloat16 = float32 in every layout.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jax.lax.dot_general(
        a,
        b,
        dims,
        precision="highest" if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32 if floating else jnp.int32,
    )


def exp2(x: Any) -> Any:
    """2 ** x of a float32 tile, by the special function unit: relative error 2^-22."""
    return jnp.exp2(x) if target.current().platform == "cpu" else _exp2.bind(x)


def fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32 tiles that broadcast, in one instruction: the compilers make two."""
    if target.current().platform == "cpu":
        return a * b + c
    return _fma.bind(*jnp.broadcast_arrays(a, b, c))


# JAX lowers `lax.exp2` to the device library, which spends four more instructions on denormals;
# MLIR's own operation becomes ex2.approx on NVIDIA and v_exp_f32 on AMD. (Not inline assembly:
# LLVM would not see the hazard of a transcendental on RDNA3.)
_exp2 = Primitive("mud_puppy_exp2")
_exp2.def_abstract_eval(lambda x: ShapedArray(x.shape, x.dtype))


@lowering.register_lowering(_exp2)
def _(context: Any, x: Any) -> Any:
    return math.exp2(x)


_fma = Primitive("mud_puppy_fma")
_fma.def_abstract_eval(lambda a, b, c: ShapedArray(c.shape, c.dtype))


@lowering.register_lowering(_fma)
def _(context: Any, a: Any, b: Any, c: Any) -> Any:
    return math.fma(a, b, c)


def inline_asm(
    text: str,
    args: Sequence[Any],
    constraints: str,
    pack: int,
    dtypes: Sequence[Any],
    pure: bool = True,
) -> list[Any]:
    """Tiles of `dtypes` from tiles of one shape by the target's own instructions; no interpreter.

    The text serves `pack` elements of each tile: $0, $1, ... are 32-bit registers (or narrower
    ones), first the results', then the arguments', each holding as many elements as fit. It must be
    a function of its arguments and the lane's number. What is not declared `pure` stays where it
    stands: the compiler neither copies it nor brings its arguments to another layout.
    """
    dtypes = tuple(map(jnp.dtype, dtypes))
    return _asm.bind(*args, text=text, constraints=constraints, pack=pack, dtypes=dtypes, pure=pure)


# JAX's own primitive of this kind fails to lower when it has several results (0.10.2, 0.11.2).
_asm = Primitive("mud_puppy_inline_asm")
_asm.multiple_results = True
_asm.def_abstract_eval(lambda *args, dtypes, **_: [ShapedArray(args[0].shape, d) for d in dtypes])


@lowering.register_lowering(_asm)
def _(
    context: Any, *args: Any, text: str, constraints: str, pack: int, dtypes: Any, pure: bool
) -> Any:
    types = [mlir.aval_to_ir_type(context.context.mlir_ctx, a) for a in context.avals_out]
    op = triton_dialect.ElementwiseInlineAsmOp(types, text, constraints, pure, pack, args)
    return list(op.results)


# One line for each lowering would say what pyproject's pin of jax already answers.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
