"""Running out of memory: the commonest error of a run that is set up well, as one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from mud_puppy.errors import UserError


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns an allocation that failed, on a device or on the host, into a UserError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "out of memory: lower batch_size (gradient_accumulation makes up for it) or "
            "max_seq_length, or split the model over more devices with mesh fsdp=N"
        ) from error
