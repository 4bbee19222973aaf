"""Every self-check of the implementations that serve on this device, for `mud-puppy doctor`."""

from mud_puppy.kernels import selfcheck, target
from mud_puppy.kernels.attention.decode import selfchecks as of_decode
from mud_puppy.kernels.attention.selection import selfchecks as of_attention
from mud_puppy.kernels.cross_entropy import selfchecks as of_cross_entropy
from mud_puppy.kernels.grouped_matmul import selfchecks as of_grouped_matmul
from mud_puppy.kernels.qgemm import selfchecks as of_qgemm
from mud_puppy.kernels.quantized_matmul import selfchecks as of_quantized_matmul

OPS = (
    of_attention,
    of_decode,
    of_cross_entropy,
    of_grouped_matmul,
    of_qgemm,
    of_quantized_matmul,
)


def selfchecks() -> list[tuple[str, selfcheck.Case]]:
    """(name, case) of each: of the Pallas kernels on a GPU, of what XLA makes elsewhere.

    The names are those that a refused kernel is logged by. `selfcheck.judge` runs one.
    """
    name = "pallas" if target.current().platform in ("cuda", "rocm") else "xla"
    return [check for op in OPS for check in op(name)]
