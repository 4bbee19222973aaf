"""What several kernels' tests ask for by name."""

import jax
import pytest


@pytest.fixture(scope="module")
def exact_products():
    """float32 on an NVIDIA card would be tf32."""
    with jax.default_matmul_precision("highest"):
        yield
