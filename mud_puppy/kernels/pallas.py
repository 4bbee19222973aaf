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
from jax._src.state.indexing import NDIndexer
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
    flops: int = 0,
) -> Callable[..., Any]:
    """`pallas_call` for the current target: arrays -> arrays of `out_shape`.

    `num_warps` is in warps of 32 threads on NVIDIA and RDNA, of 64 on CDNA. The grid has at most
    three dimensions; the first is the fastest. `name` is the kernel's in profiles and binaries.
    `flops`: of its matrix products, two for each multiplication, for those who count (`plan`).
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
        cost_estimate=pallas.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=0),
    )

    def in_32_bits(*args: Any) -> Any:
        with jax.enable_x64(False):  # Python's numbers in a kernel would be 64 bits wide
            return run(*_undifferentiated(*args))

    return in_32_bits


@jax.custom_jvp
def _undifferentiated(*args: Any) -> Any:
    """The arguments of a kernel, whose gradient is its op's: only a second one comes here."""
    return args


@_undifferentiated.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "a Pallas kernel has no second derivative: pass implementation='xla' (or 'reference') to "
        "the op whose gradient is differentiated again"
    )


def too_long(*arrays: Any) -> str | None:
    """Why no kernel can read one of these arrays, or None.

    JAX's lowering (0.10.2, 0.11.2) counts elements in signed 32 bits up to arrays of 2^32 bytes:
    from 2^31 elements of one byte on, addresses would be negative.
    """
    for x in arrays:
        if x.dtype.itemsize == 1 and 2**31 < x.size <= 2**32:
            return f"{x.dtype}{list(x.shape)} has between 2^31 and 2^32 elements of one byte"
    return None


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
    """2 ** x of a float32 tile, by the special function unit: relative error 2^-22. On NVIDIA a
    result below 2^-126 is 0."""
    platform = target.current().platform
    if platform == "cpu":
        return jnp.exp2(x)
    if platform == "cuda":  # what MLIR's operation becomes there keeps denormals: four instructions
        return inline_asm("ex2.approx.ftz.f32 $0, $1;", [x], "=f,f", 1, [jnp.float32])[0]
    return _exp2.bind(x)


def fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32 tiles that broadcast, in one instruction: the compilers make two."""
    if target.current().platform == "cpu":
        return a * b + c
    return _fma.bind(*jnp.broadcast_arrays(a, b, c))


# JAX lowers `lax.exp2` to the device library, which spends four more instructions on denormals;
# MLIR's own operation becomes v_exp_f32 on AMD. (Not inline assembly: LLVM would not see the hazard
# of a transcendental on RDNA3.)
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


def fetch(ref: Any, indices: Sequence[Any], count: int, valid: Any = None) -> list[Any]:
    """`count` (1, 2 or 4) consecutive 32-bit elements of a ref, from each index of the last axis.

    `indices` are tiles or scalars, one for each axis. Returns tiles of the last one's shape,
    undefined where `valid` is false. Loads of this kind are issued in the program's order, ahead of
    what is computed after them: ptxas puts others off until their value is needed. For NVIDIA and
    the interpreter.
    """
    *lead, last = indices
    if target.current().platform == "cpu":
        other = None if valid is None else 0
        return [load(ref.at[(*lead, last + i)], mask=valid, other=other) for i in range(count)]
    lead = [jnp.broadcast_to(i, last.shape) for i in lead]
    masks = [] if valid is None else [valid.astype(jnp.int32)]
    return _fetch.bind(ref, *lead, last, *masks, count=count, masked=bool(masks))


_fetch = Primitive("mud_puppy_fetch")
_fetch.multiple_results = True
_fetch.def_abstract_eval(
    lambda ref, *tiles, count, masked: [ShapedArray(tiles[0].shape, ref.dtype)] * count
)


@lowering.register_lowering(_fetch)
def _(context: Any, pointer: Any, *tiles: Any, count: int, masked: bool) -> Any:
    ref, tile = context.avals_in[:2]
    indices, masks = (tiles[:-1], tiles[-1:]) if masked else (tiles, ())
    where = NDIndexer(tuple(indices), ref.shape, tile.shape)
    pointers = lowering._compute_pointers_from_indices(pointer, context.block_infos[0], where)
    to = ", ".join(f"${i}" for i in range(count))
    # Relaxed: ptxas keeps such loads in order, and they may still hit the first-level cache.
    text = f"ld.relaxed.cta.global.v{count}.b32 {{{to}}}, [${count}];"
    if count == 1:
        text = "ld.relaxed.cta.global.b32 $0, [$1];"
    if masks:
        text = f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; @p {text} }}"
    types = [mlir.aval_to_ir_type(context.context.mlir_ctx, a) for a in context.avals_out]
    constraints = ",".join(["=r"] * count + ["l"] + ["r"] * len(masks))
    args = [pointers, *masks]
    op = triton_dialect.ElementwiseInlineAsmOp(types, text, constraints, False, 1, args)
    return list(op.results)


# One line for each lowering would say what pyproject's pin of jax already answers.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
