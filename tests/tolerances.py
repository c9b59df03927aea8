"""The one table of tolerances: relative norm against the float64 reference on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor

# Of an attention state (float32 or wider) against float64, for scores below 20 in size.
STATE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
# Of an output whose weights were rounded to bfloat16: half a last place of 8 bits, of the terms' size.
ROUNDED_WEIGHTS = 2e-3
# Of one whose queries and weights were rounded to 16 bits, 2^-16 of the largest of a row or a block of 64.
OF_16_BITS = 1e-4
# Of gradients whose weights, and their gradients, were: 2^-8 at most, and that where one term is all there is.
ROUNDED_GRADIENTS = 4e-3
# Of an output rounded to the inputs' dtype.
OUT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def relative_norm(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| over the finite elements; infinity where the others are not equal."""
    found, expected = found.double(), expected.double()
    if found.shape != expected.shape:
        return float("inf")
    finite = expected.isfinite()
    others_equal = torch.equal(found[~finite].nan_to_num(nan=7.0), expected[~finite].nan_to_num(nan=7.0))
    if not others_equal or not bool(found[finite].isfinite().all()):
        return float("inf")
    return float((found[finite] - expected[finite]).norm() / expected[finite].norm().clamp(min=1e-30))


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Equal by relative norm and, ten times as loosely, element by element on the scale of the largest."""
    error = relative_norm(found, expected)
    assert error <= tolerance, f"{what}: relative norm of the error {error:.2e}, allowed {tolerance:.0e}"
    finite = expected.isfinite()
    if bool(finite.any()):
        size = float(expected[finite].double().abs().max())
        largest = float((found.double() - expected.double())[finite].abs().max())
        assert largest <= 10 * tolerance * max(size, 1e-30), f"{what}: largest error {largest:.2e} of {size:.2e}"
