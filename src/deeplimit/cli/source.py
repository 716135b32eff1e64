"""What the verbs for a trained network are given: a run, or a model that was trained elsewhere."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from deeplimit.cli.options import Trust
from deeplimit.errors import InputError

if TYPE_CHECKING:
    from deeplimit.training import RunFolder


@dataclass(frozen=True)
class Source:
    """A run folder; or a model and its data, from which a new run folder is made without training.

    Attributes:
        run: a run folder, or a model as in `deeplimit train --model`.
    """

    run: Annotated[str, Positional, arg(metavar="RUN|MODEL")]
    """The run folder that train wrote; or with --data a trained model: transformers:FOLDER,
    module:function, a .safetensors file of a network, … as in deeplimit train --model."""
    data: Annotated[str | None, arg(metavar="DATA")] = None
    """Of a MODEL: its data, as in deeplimit train; of a model of text text:FILE, or table:FILE with
    columns text and label. A new run folder is made, nothing is trained."""
    length: Annotated[int | None, arg(metavar="L")] = None
    """Of a MODEL of text: tokens of a window, or the most of a text in a table; 256 by default."""
    data_dir: Path | None = None
    """Of a MODEL: folder that holds the data sets' folders; else DEEPLIMIT_DATA says where."""
    weights: Annotated[Path | None, arg(metavar="FILE")] = None
    """Of a MODEL: its weights, .safetensors or a state_dict (.pt), where it brings none."""
    stack: Annotated[str | None, arg(metavar="NAME")] = None
    """Of a MODEL with several lists of blocks: the one that is meant; by default the longest."""
    mean: tuple[float, ...] | None = None
    """Of a MODEL: mean of each channel that it was trained with, as in deeplimit train."""
    std: tuple[float, ...] | None = None
    """Of a MODEL: standard deviation of each channel, likewise."""
    runs: Annotated[Path, arg(metavar="DIR")] = Path("runs")
    """Of a MODEL: folder for the run folder."""
    name: Annotated[str | None, arg(metavar="NAME")] = None
    """Of a MODEL: the run folder's name; by default the data set's."""
    trust: Trust = False

    @contextmanager
    def opened(self) -> Iterator["RunFolder"]:
        """The run folder; one that was made now for a model is gone if what was asked is wrong.

        Raises:
            InputError: as `folder`.
        """
        folder = self.folder()
        try:
            yield folder
        except InputError:
            if self.data is not None:
                shutil.rmtree(folder.path, ignore_errors=True)
            raise

    def folder(self) -> "RunFolder":
        """The run folder, made now for a model.

        Raises:
            InputError: no such run or model, a model without data, or a run with options of one.
        """
        from deeplimit.training import RunFolder, recipe_for, train
        from deeplimit.training.trust import is_run

        if is_run(self.run):
            for field in fields(Source):
                own = field.name not in ("run", "trust")
                if own and getattr(self, field.name) != field.default:
                    option = f"--{field.name.replace('_', '-')}"
                    raise InputError(
                        f"{option} given, but {self.run} is a run folder, which has its own; leave "
                        f"{option} out"
                    )
            return RunFolder.open(self.run, trust=self.trust)
        if self.data is None:
            raise InputError(
                f"{self.run} is a model, not a run folder: give its data too, such as "
                "--data cifar10"
            )
        recipe = replace(
            recipe_for(self.data, self.run),
            epochs=0,
            length=self.length,
            data_dir=self.data_dir,
            weights=self.weights,
            stack=self.stack,
            mean=self.mean,
            std=self.std,
        )
        return train(recipe, runs=self.runs, name=self.name)
