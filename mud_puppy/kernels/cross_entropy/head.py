"""Rows of the head [V, D], which is an array or `Quantized`: a chunk, or those of given words."""

import dataclasses
from typing import Any

import jax

from mud_puppy.kernels.formats import Quantized, decoded_scales, dequantize


def plain(head: Any) -> Any:
    """The head with scales that are its rows' own: doubly quantized ones are decoded, 1/64 of D."""
    if isinstance(head, Quantized) and head.nested is not None:
        scales = decoded_scales(head)
        return dataclasses.replace(head, scales=scales, nested=None, offset=None)
    return head


def chunk(head: Any, start: Any, size: int, dtype: Any) -> Any:
    """Rows start to start + size, [size, D]."""
    if size == head.shape[0]:
        return _decoded(head, dtype)
    rows = _each_row(head, lambda a: jax.lax.dynamic_slice_in_dim(a, start, size))
    return _decoded(rows, dtype)


def words(head: Any, y: Any, dtype: Any) -> Any:
    """Rows of the words y [...]: [..., D]."""
    return _decoded(_each_row(head, lambda a: a[y]), dtype)


def _decoded(head: Any, dtype: Any) -> Any:
    return dequantize(head, dtype) if isinstance(head, Quantized) else head.astype(dtype)


def _each_row(head: Any, f: Any) -> Any:
    """f of every leaf that has rows; a scale of the whole weight stays."""
    V = head.shape[0]
    return jax.tree.map(lambda a: f(a) if a.shape[0] == V else a, head)
