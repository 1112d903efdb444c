"""The one question about shapes that NumPy answers with an exception."""

import numpy as np


def broadcasts_to(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Tells whether an array of one shape broadcasts to another.

    Examples:
        >>> broadcasts_to((3, 1), (2, 3, 4)), broadcasts_to((2,), (3,))
        (True, False)
    """
    try:
        return np.broadcast_shapes(shape, to) == tuple(to)
    except ValueError:
        return False
