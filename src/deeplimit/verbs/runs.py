"""Verbs on a run: train it, look at it, cut it, heal it, make it deeper, check its files."""

from functools import partial
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from deeplimit.errors import InputError, RunError
from deeplimit.files import check_runs
from deeplimit.studies.experiments import RUNS
from deeplimit.training import Recipe, RunFolder
from deeplimit.training.run_folder import check_recipe, check_run
from deeplimit.verbs.answer import (
    COUNT,
    FRACTION,
    PART,
    POSITIVE,
    SURE,
    Answer,
    Elsewhere,
    Run,
    Runs,
    Seed,
    Trust,
    Within,
    option,
    profiled,
    renew_page,
    show,
    unusual,
)

Source = Annotated[
    str | Path,
    "RUN|MODEL",
    Doc(
        "The run folder that train wrote; or with --data a trained model: transformers:FOLDER, "
        "module:function, a .safetensors file of a network, … as in deeplimit train --model."
    ),
]

BESIDE = ("run", "of", "resume", "trust", "quiet")  # what of heal's parameters is no setting of it


def train(
    recipe: Recipe,
    *,
    runs: Runs = RUNS,
    name: Annotated[str | None, "NAME"] = None,
    quiet: bool = False,
) -> Answer:
    """Train a network that is too deep with a stage cost, cut it to the depth that is enough.

    Ends with a table of every depth at which the one network can be used. Leaves a folder,
    runs/NAME, with recipe, metrics, weights, the profile of its turnpike, the cut and a page,
    report.html. A control (--control plain) has folders of its own beside it.
    The defaults below are those of the data set given. For example:
      deeplimit train digits --depth 40 --stage-cost 0.1
      deeplimit train digits --control plain              beside networks without stage cost
      deeplimit train mnist --data-dir DIR
      deeplimit train mnist --help                        the defaults for MNIST
      deeplimit train --recipe runs/mnist/recipe.toml     the same run again
      deeplimit train --resume runs/mnist                 go on with a run that was stopped
      deeplimit train cifar10 --model transformers:my-vit --new-head      a model that you have
      deeplimit train cifar10 --model net:build --weights net.pt          build() in net.py

    A transformers model is left in the folder RUN/model, which plain transformers loads. Images
    are standardised before the model sees them, by mean and std in recipe.toml.

    Args:
        recipe: What to train.
        name: The run folder's name; by default the data set's. A name that is taken gets -2, -3, …
        quiet: No progress on stderr.

    Raises:
        InputError: before anything is written: wrong input.
        RunError: the run failed; the last good checkpoint is kept.
    """
    check_recipe(recipe, runs, name)
    from deeplimit.training import complete, train

    return show(
        train(recipe, runs=runs, name=name, quiet=quiet, then=partial(complete, quiet=quiet))
    )


def resume(run: Run, *, trust: Trust = False, quiet: bool = False) -> Answer:
    """Goes on with a run that was stopped, to the same result as an unbroken one; then as `train`.

    Raises:
        InputError, RunError: as `train`.
    """
    RunFolder.open(run, trust=trust)
    from deeplimit.training import complete, resume

    return show(resume(run, trust=trust, quiet=quiet, then=partial(complete, quiet=quiet)))


def demo(*, seed: Seed = 0, runs: Runs = RUNS) -> Answer:
    """Show all of it on mazes that need depth, in about a minute.

    Trains 8 layers once, with a stage cost, to be used at every depth, and cuts them to the depth
    that is enough. As the control it trains the same network without stage cost and cuts it alike,
    and one of the cut's depth from scratch. Leaves a run folder with a page. For example:
      deeplimit demo
      deeplimit train digits --control plain        the same on digits, which need no depth

    Args:
        seed: Seed of the initial parameters and of the order of the samples.
    """
    check_runs(runs)
    from deeplimit.studies import demo_recipe, run_demo

    return show(run_demo(demo_recipe(seed), runs=runs))


def report(run: Run) -> Answer:
    """Write the page of a run again from the results in its folder; nothing is computed.

    One self-contained file, RUN/report.html, that opens offline. For example:
      deeplimit report runs/digits
    """
    return show(RunFolder.open(run))


def profile(run: Source, of: Elsewhere = Elsewhere(), *, trust: Trust = False) -> Answer:
    """Measure the turnpike of a trained network, layer by layer, and show it.

    Loss, accuracy, distance to the minimisers and relative update of every layer, on training,
    validation and test data, and what the network costs that ends there: parameters, multiply-adds
    and latency; written to RUN/profile.json and into the page. For example:
      deeplimit profile runs/digits
      deeplimit profile transformers:my-vit --data cifar10      a model trained elsewhere
      deeplimit profile transformers:my-llama --data text:book.txt        a language model
      deeplimit profile transformers:my-bert --data table:reviews.csv     a classifier of texts
      deeplimit profile resnet20.safetensors --data cifar10 --data-dir DIR

    A model that was trained elsewhere gets a run folder, runs/NAME, that crop and heal go on with.
    """
    with of.opened(str(run), trust=trust) as folder, folder.commit() as new:
        from deeplimit.training import profile_run

        profiles = profile_run(new)
        page = renew_page(new)
    return Answer(profiles, (page,), (folder.path,))


def crop(
    run: Source,
    of: Elsewhere = Elsewhere(),
    *,
    to: Annotated[int | Literal["auto"], "K|auto"] = "auto",
    points: Annotated[float | None, "P", Within(0, 50, below=True)] = None,
    rise: Annotated[float | None, "NATS", Within(0)] = None,
    blocks: Annotated[int | None, "K", COUNT] = None,
    multiply_adds: Annotated[float | None, "F", FRACTION] = None,
    latency: Annotated[float | None, "F", FRACTION] = None,
    confidence: Annotated[float | None, "C", SURE] = None,
    bridge: bool = False,
    search: bool = False,
    epochs: Annotated[int, COUNT] = 1,
    trust: Trust = False,
    quiet: bool = False,
) -> Answer:
    """Cut a trained network to fewer layers, and measure on test data what that changes.

    Writes the smaller network to RUN/cropped.safetensors, the figures to RUN/crop.json and into the
    page. For example:
      deeplimit crop runs/digits --to 5
      deeplimit crop runs/digits --to auto
      deeplimit crop runs/mnist --to auto --points 0.1
      deeplimit crop runs/mnist --confidence 0.95
      deeplimit crop runs/cifar10 --multiply-adds 0.5
      deeplimit crop runs/cifar10 --blocks 20 --bridge
      deeplimit crop runs/mnist --search                        heal it on the way to fewer layers
      deeplimit crop transformers:my-vit --data cifar10         a model trained elsewhere
      deeplimit crop transformers:my-llama --data text:FILE     a language model, by its loss

    Of a transformers model the smaller one is the folder RUN/cropped, which plain transformers
    loads. A model that was trained elsewhere gets a run folder, runs/NAME, without any training.

    Args:
        to: How many layers to keep, the first so many; auto: the fewest that are as good as the
            full network on validation data, of a network with several stages from any place.
        points: With auto: how many points of accuracy (percent of the samples) may be lost; the
            recipe's if not given, 0.5. On validation data 1.645 standard errors are added, and the
            loss may rise by 1 % of its range, or as large a part as the points, if more. Test data
            then say whether it was kept.
        rise: Of a language model, with auto: by how many nats a token its loss may rise, in place
            of points; the recipe's if not given, 0.05: a perplexity 5 % higher.
        blocks: Keep K layers from any place, chosen on validation data.
        multiply_adds: Remove layers from any place until at most this fraction of the
            multiply-adds is left, chosen on validation data.
        latency: The same for the latency, measured on this machine.
        confidence: With auto, points or rise: lose no more with this probability, whatever the
            network: layers are tested one after the other, up to the first whose cut fails. At 0.95
            one point takes 311 validation samples, half a one 623. The recipe's if not given; by
            default more layers go, without that guarantee.
        bridge: Fit what the removed layers did on training data, by least squares, and fold it into
            the weights before them; heal then starts from there.
        search: Go on to half the layers, half of these, … and heal at each depth (--epochs) while
            validation data exclude that more than --points is lost; then between the last depth
            that was kept and the first that was not. After a stop the same command goes on.
        epochs: Of search: passes over the training data at each depth.
    """
    budgets: dict[str, Any] = {"blocks": blocks, "multiply_adds": multiply_adds, "latency": latency}
    asked = budgets | {"to": None if to == "auto" else to, "points": points, "rise": rise}
    given = [option(name) for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} given; a cut follows from one of them: give one")
    if confidence is not None and (to != "auto" or any(v is not None for v in budgets.values())):
        raise InputError(
            f"--confidence and {given[0]} given; a confidence goes with auto, --points or --rise"
        )
    others = budgets | {"to": asked["to"], "confidence": confidence, "bridge": bridge or None}
    if search and (wrong := [name for name, value in others.items() if value is not None]):
        named = option(wrong[0])
        raise InputError(f"--search and {named} given; a search goes with --points or --rise")
    if epochs != 1 and not search:
        raise InputError("--epochs given, but nothing is healed; give --search, or see heal")
    if points is not None:
        budgets["accuracy"] = points / 100
    with of.opened(str(run), trust=trust) as folder, folder.commit() as new:
        from deeplimit.training import crop_run, search_run

        if search:
            accuracy = budgets.get("accuracy")
            cut = search_run(new, epochs=epochs, accuracy=accuracy, rise=rise, quiet=quiet)
        else:
            cut = crop_run(new, to, rise=rise, bridge=bridge, confidence=confidence, **budgets)
        beside, page = (new.reference(), new.profiles()), renew_page(new)
    return Answer(cut, (page,), beside)


def heal(
    run: Source,
    of: Elsewhere = Elsewhere(),
    *,
    epochs: Annotated[int, COUNT] = 1,
    learning_rate: Annotated[float | None, POSITIVE] = None,
    teacher: Literal["full", "beside", "none"] = "full",
    teacher_weight: Annotated[float, "W", PART] = 0.5,
    fade: Annotated[float | None, PART] = None,
    temperature: Annotated[float, POSITIVE] = 2.0,
    resume: bool = False,
    trust: Trust = False,
    quiet: bool = False,
) -> Answer:
    """Train a cut network a little more, and measure on test data what that recovers.

    The layers cut are not gone at once: they fade out in the first part of the training; a cut that
    was bridged (crop --bridge) is trained as it is. The full
    network teaches the cut one: beside the labels it learns the full one's answers (soft targets).
    Everything else is the run's own recipe. Writes RUN/healed.safetensors (of a transformers model
    the folder RUN/healed), the figures to RUN/heal.json and into the page. For
    example:
      deeplimit crop runs/mnist --to 6
      deeplimit heal runs/mnist --epochs 1
      deeplimit heal runs/mnist --teacher none              plain fine-tuning
      deeplimit heal runs/vit --teacher beside              the full network learns beside
      deeplimit heal runs/mnist --resume                    go on with one that was stopped
      deeplimit heal transformers:my-vit --data cifar10     cut to the depth that is enough, heal
      deeplimit heal transformers:my-llama --data text:FILE       the same of a language model

    Args:
        epochs: Passes over the training data.
        learning_rate: Largest learning rate of the one-cycle schedule; a tenth of the run's by
            default.
        teacher: full: the network before the cut teaches; beside: it does, and learns too, on the
            same batches: for a model trained on other data, at more than twice the time; none:
            labels alone.
        teacher_weight: Weight of the teacher's answers, from 0 to 1; the labels have the rest.
        fade: Part of the training in which the layers to be cut lose their step size, 0.45 by
            default; 0: cut at once, as a bridged cut always is.
        temperature: How much both networks' answers are softened before they are compared; 1: not
            at all.
        resume: Go on with a healing that was stopped, by its own settings; goes with json alone.
    """
    settings = {name: value for name, value in locals().items() if name not in BESIDE}
    if resume:
        defaults = {name: one.default for name, one in signature(heal).parameters.items()}
        for changed in unusual(settings | vars(of), defaults | vars(Elsewhere())):
            raise InputError(
                f"{option(changed)} and --resume given; a healing goes on by its own settings: "
                "leave one of them out"
            )
        with RunFolder.open(run, trust=trust).commit() as new:
            from deeplimit.training import resume_heal

            healing = resume_heal(new, quiet=quiet)
            page = renew_page(new)
        return Answer(healing, (page,))
    of.check(str(run), trust=trust)
    from deeplimit.training import crop_run, heal_run
    from deeplimit.training.healing import check_healing

    # Before a model gets a run folder, who calls from Python too.
    check_healing(epochs, teacher_weight, temperature, fade or 0.0)
    folder = of.folder(str(run), trust=trust)
    if of.data is not None:  # a run made just now
        crop_run(folder)
    with folder.commit() as new:
        healing = heal_run(new, **settings, quiet=quiet)
        page = renew_page(new)
    return Answer(healing, (page,))


def refine(
    run: Run,
    *,
    factor: Annotated[int, "M", COUNT] = 2,
    epochs: Annotated[int, Within(0)] = 0,
    learning_rate: Annotated[float | None, POSITIVE] = None,
    name: Annotated[str | None, "NAME"] = None,
    trust: Trust = False,
    quiet: bool = False,
) -> Answer:
    """Make a trained network deeper without starting again, and train on from there.

    Every stage gets so many times as many layers. Their controls are interpolated in depth and the
    step is divided, so that a network that is smooth in depth (deeplimit ode tells) computes nearly
    the same. Leaves a new run folder, RUN-x2, with the deeper network, its recipe, and the test
    accuracy before and after in refine.json. For example:
      deeplimit refine runs/mnist                       24 layers → 48
      deeplimit refine runs/mnist --factor 3 --epochs 5
      deeplimit train --resume runs/mnist-x2            go on with one that was stopped

    Args:
        run: The run folder that train wrote, of a network of deeplimit's own or of transformers.
        factor: How many times as many layers.
        epochs: Passes over the training data from there, with the state of the optimiser carried
            along and a one-cycle schedule of their own; 0: none.
        learning_rate: Largest learning rate of the schedule; the run's by default.
        name: The new run folder's name, beside the run's; by default the run's with -x and the
            factor.
    """
    folder = RunFolder.open(run, trust=trust)
    from deeplimit.training import refine_run

    made = refine_run(
        folder, factor, epochs=epochs, learning_rate=learning_rate, name=name, quiet=quiet
    )
    page = profiled(made)
    refinement = made.refinement()
    if refinement is None:
        raise RunError(f"{made.path}: its refine.json is gone; refine again: {run}")
    return Answer(refinement, (page,))


def verify(run: Run, *, accept: bool = False) -> Answer:
    """Check every file of a run against run.json, which holds the size and sha256 of each.

    Exit code 0 if all are as they were written, 2 if one is not, or nobody knows because run.json
    was lost. Then what to do is said. The other verbs check what they read, and refuse what does
    not match. For example:
      deeplimit verify runs/digits
      deeplimit verify runs/digits --accept     after you changed recipe.toml yourself

    Args:
        accept: Vouch for the files as they are now: that you changed, or whose run.json was lost.
    """
    check_run(Path(run))
    from deeplimit.training.verifying import verify_run

    found = verify_run(Path(run), accepting=accept)
    wrong = "; ".join(f"{file.name} is {file.state}: {file.remedy}" for file in found.wrong)
    told = f"{run}: {len(found.wrong)} of {len(found.files)} files not as they were written: "
    return Answer(found, fault=told + wrong if wrong else "")
