"""Named data sets, their splits and the loaders that batch them."""

from typing import TYPE_CHECKING

from deeplimit.extras import lazy

if TYPE_CHECKING:
    from deeplimit.data.dataset import Augmentation, DataSet, Split, Standardisation, iter_batches
    from deeplimit.data.registry import load_dataset

__all__ = ["Augmentation", "DataSet", "Split", "Standardisation", "iter_batches", "load_dataset"]

__getattr__, __dir__ = lazy(__name__, {"batches": "iter_batches", "load": "load_dataset"})
