"""NoWag's normalisation: the columns, then the rows of a weight divided by their norms."""

import torch
from torch import Tensor

from sparsekit.errors import NumericalError


def normalise(weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """The doubly normalised weight `[out, in]`, the column norms `[in]`, then row norms `[out]`.

    The weight is the first times both norms; `epsilon` is added to every norm.
    """
    columns = weight.norm(dim=0) + epsilon
    normal = weight / columns
    rows = normal.norm(dim=1) + epsilon
    return normal / rows[:, None], columns, rows


def importance(squares: Tensor) -> Tensor:
    """The squared inputs, `[in]`; zero entries count as the mean of the others.

    Raises:
        NumericalError: All are zero.
    """
    valid = squares > 0
    if not valid.any():
        raise NumericalError("every calibration input is zero", code="zero-inputs")
    return torch.where(valid, squares, squares[valid].mean())
