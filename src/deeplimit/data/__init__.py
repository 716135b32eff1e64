"""Named data sets, their splits and the loaders that batch them."""

from deeplimit.data.augmentation import Augmentation
from deeplimit.data.batches import batches
from deeplimit.data.dataset import DataSet, Split
from deeplimit.data.registry import load
from deeplimit.data.standardisation import Standardisation

__all__ = ["Augmentation", "DataSet", "Split", "Standardisation", "batches", "load"]
