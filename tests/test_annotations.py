"""While the tests run, annotations and the shapes in them are checked, of local functions too."""

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from sparing_checks import DEFINITIONS, sparing

from deeplimit.errors import several
from deeplimit.network.blocks import ConvolutionalResidual


def test_types_and_shapes_are_checked() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        several("two", "layer")
    with pytest.raises(jaxtyping.TypeCheckError):
        ConvolutionalResidual(3, 3, "group", "relu")(torch.zeros(2, 3, 4))


def test_of_a_local_function_the_first_definitions_are_checked() -> None:
    check = sparing(beartype)

    def define() -> object:
        @check
        def half(number: float) -> float:
            return number / 2

        @check()
        def twice(number: int) -> int:
            return 2 * number

        return half, twice

    for _ in range(DEFINITIONS):
        for one in define():
            with pytest.raises(BeartypeCallHintViolation):
                one("x")
    half, twice = define()
    assert (half(3), twice("x")) == (1.5, "xx")
