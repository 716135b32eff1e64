"""Random stacks: no gradient of coded states is wrong beyond the tolerance without a word.

500 more by `python benchmarks/coded_states.py --hunt 60 560`.
"""

import pytest
from random_stacks import hunted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_no_error_beyond_the_bound_that_is_told(seed: int) -> None:
    found = hunted(seed)
    assert found.coded or found.depth < 4
    assert found.error <= max(found.bound, found.rounding), found
