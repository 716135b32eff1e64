"""What holds for rebuilt states is tried with coded ones too."""

from dataclasses import replace
from functools import partial

import pytest
from torch import nn

from deeplimit import use_adjoint
from deeplimit.gradient import Layout, layout

APART = {"codes", "coded_states", "hunt", "planning", "orders", "processes", "memory"}
OF_THE_FIXED_POINT = {  # tests of its own figures, of what it cannot do, or of its warnings
    "test_a_backward_pass_that_ends_before_a_kept_state_says_so",
    "test_a_large_drift_warns_once_with_the_layer_and_the_remedy",
    "test_a_network_that_cannot_be_inverted_warns",
    "test_states_that_were_planned_keep_the_tolerance",
    "test_autocast_runs_and_its_error_is_reported",
    "test_drift_is_the_rebuilt_state_against_the_true_one",
    "test_loss_is_the_same_and_the_reported_error_is_the_error",
    "test_one_huge_update_does_not_hide_the_drift",
    "test_post_norm_model_stays_plain_and_says_so",
    "test_rounding_in_bfloat16_states_is_a_drift_that_warns",
    "test_settings_of_a_copy_are_its_own",
    "test_states_of_low_precision",
}


def whole_layout(model: nn.Module) -> Layout:
    """Blocks that are coded as if they were rebuilt."""
    found = layout(model)
    return replace(found, rebuilt=(*found.rebuilt, *found.coded))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    subject = metafunc.module.__name__.rpartition("test_")[2].removeprefix("adjoint_")
    name = metafunc.function.__name__
    if subject not in APART and name not in OF_THE_FIXED_POINT:
        coded = pytest.param(4, id="coded", marks=pytest.mark.slow)
        metafunc.parametrize("bits_of_all", [pytest.param(0, id="rebuilt"), coded], indirect=True)


@pytest.fixture(autouse=True)
def bits_of_all(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`use_adjoint` with these bits, in the test's own module."""
    bits = getattr(request, "param", 0)
    if bits and hasattr(request.module, "use_adjoint"):
        monkeypatch.setattr(request.module, "use_adjoint", partial(use_adjoint, bits=bits))
        monkeypatch.setattr(request.module, "layout", whole_layout, raising=False)
