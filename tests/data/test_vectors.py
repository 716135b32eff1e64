"""Tables of numbers far from 0, and such as 32 bits cannot tell apart."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deeplimit.data import DataSet, load_dataset
from deeplimit.data.splitting import checked_vectors
from deeplimit.errors import InputError
from deeplimit.network import Architecture
from deeplimit.network import load as load_network
from deeplimit.network.storage import save
from deeplimit.training import Recipe
from deeplimit.training.building import prepare

Y = np.arange(90) % 3
# Multiples of 2⁻²⁰: adding 10⁹ in 64 bits loses nothing.
X = np.round(np.random.default_rng(0).normal(size=(90, 3)) * 2**20) / 2**20


def loaded(tmp_path: Path, x: np.ndarray) -> DataSet:
    np.savez(tmp_path / "set.npz", x=x, y=Y)
    return load_dataset(f"npz:{tmp_path / 'set.npz'}")


@pytest.mark.parametrize("offset", [1e9, -1e6, [1e9, 0, 0]])
def test_the_network_sees_the_same_wherever_the_features_lie(
    offset: float | list[float], tmp_path: Path
) -> None:
    plain, far = loaded(tmp_path, X), loaded(tmp_path, X + offset)
    assert (plain.train.x.dtype, far.train.x.dtype) == (torch.float32, torch.float64)
    recipe = Recipe(data="npz:set.npz", width=8, hidden=4, depth=(2,))
    networks = [prepare(recipe, data).model.eval() for data in (plain, far)]
    logits = [m(data.test.x) for m, data in zip(networks, (plain, far), strict=True)]
    assert logits[1].dtype == torch.float32
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    assert logits[0].std() > 0.1
    # And so does what is saved of it.
    again = load_network(save(networks[1], tmp_path / "network.safetensors"))
    assert torch.equal(again(far.test.x), logits[1])
    # A model that is given is standardised outside: in 64 bits too.
    batches = [data.standardised().train for data in (plain, far)]
    scaled = [split.standardisation.apply(split.x) for split in batches]  # type: ignore[union-attr]
    assert scaled[1].dtype == torch.float32
    torch.testing.assert_close(scaled[1], scaled[0], rtol=1e-5, atol=1e-5)


def test_integers_far_from_0(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 1000, (90, 3))
    data = loaded(tmp_path, numbers + 2**52)
    assert data.train.x.dtype == torch.float64
    rows = {tuple(row) for row in (data.train.x.numpy() - 2.0**52).astype(int)}
    assert rows <= {tuple(row) for row in numbers}
    years = np.random.default_rng(0).integers(1900, 2000, (90, 3))
    assert loaded(tmp_path, years).train.x.dtype == torch.float32  # exact: no need for more


def test_mixed_precision_is_refused_where_it_would_round_first(tmp_path: Path) -> None:
    data = loaded(tmp_path, X + 1e9)
    recipe = Recipe(data="npz:set.npz", precision="bf16-mixed", width=8, hidden=4)
    with pytest.raises(InputError, match="precision is bf16-mixed, but"):
        prepare(recipe, data)


def test_the_rest_of_the_mean_is_loaded_only_where_there_is_one() -> None:
    ordinary = Architecture("vector", (3,), 2, (1,), 4, 4).build()
    far = Architecture("vector", (3,), 2, (1,), 4, 4).build()
    mean, std = torch.tensor([1e9 + 1, 0.3, 0], dtype=torch.float64), torch.ones(3)
    far.standardise(mean, std)
    ordinary.standardise(mean * 1e-9, std)
    assert "stem.0.rest" not in ordinary.state_dict()
    far.load_state_dict(ordinary.state_dict())
    assert far.state_dict().keys() == ordinary.state_dict().keys()


def column(*values: float, dtype: type = np.float64) -> np.ndarray:
    x = np.zeros((90, 2), dtype)
    x[:, 1] = np.resize(np.array(values, dtype), 90)
    return x


REFUSED = {
    "identification numbers": column(2**60, 2**60 + 1, 2**60 + 2, dtype=np.int64),
    "unsigned ones": column(2**63 + 1, 2**63, 2**63 + 5, dtype=np.uint64),
    "two scales in integers": column(0, 1, 10**17, dtype=np.int64),
    "two scales": column(0, 1e-9, 1),
    "two scales in 32 bits": column(0, 1e-9, 1, dtype=np.float32),
    "a rare value far out": column(*np.random.default_rng(0).normal(size=89), 1e30),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_would_become_one_are_refused_by_name(case: str, tmp_path: Path) -> None:
    says = r"set\.npz: x\[:, 1\] has the values .* and .*, which are one in 32 bits"
    with pytest.raises(InputError, match=says):
        loaded(tmp_path, REFUSED[case])


def test_what_is_smooth_or_only_rounded_otherwise_is_taken() -> None:
    generator = np.random.default_rng(0)
    smooth = generator.normal(size=(100_000, 1)) * 1e-30  # some neighbours meet in 32 bits
    heavy = generator.standard_cauchy(size=(10_000, 1))
    rounded = np.resize([0.1 + 0.2, 0.3, 0.7], (90, 1))  # the first two differ in the last bit
    for x in (smooth, heavy, rounded):
        np.testing.assert_allclose(checked_vectors(x, "x"), x, rtol=1e-6)
