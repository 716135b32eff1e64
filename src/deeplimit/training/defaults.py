"""Default recipes: one entry for each named data set, one for each kind of unnamed data."""

from dataclasses import replace

from deeplimit.training.recipe import Recipe

# The figures that benchmarks/results report were reached with these.
RECIPES: dict[str, Recipe] = {
    "digits": Recipe(points=1.0),  # with 359 and 200 test samples less cannot be told
    "spirals": Recipe(
        data="spirals",
        kind="logit",
        depth=(40,),
        width=2,
        hidden=32,
        activation="tanh",
        step=0.25,
        stage_cost=0.25,
        epochs=200,
        weight_decay=1e-2,
        batch_size=50,
        learning_rate=1e-2,
        points=1.5,
    ),
    "mazes": Recipe(
        data="mazes",
        kind="convolutional",
        depth=(8,),
        width=16,
        hidden=16,
        reduction=1,
        stage_cost=1.0,
        stage_cost_grows=True,
        points=1.0,
        epochs=5,
        weight_decay=1e-2,
        learning_rate=1e-2,
    ),
    "mnist": Recipe(
        data="mnist",
        kind="convolutional",
        depth=(24,),
        width=16,
        hidden=16,
        reduction=4,
        stage_cost=0.2,
        epochs=14,
        weight_decay=1e-2,
        batch_size=128,
        learning_rate=5e-3,
        crop=2,
    ),
    "cifar10": Recipe(
        data="cifar10",
        kind="convolutional",
        depth=(9, 9, 9),
        width=16,
        hidden=16,
        reduction=1,
        epochs=100,
        batch_size=128,
        learning_rate=5e-3,
        weight_decay=5e-4,
        crop=4,
        flip=True,
    ),
}
IMAGES = replace(RECIPES["cifar10"], depth=(8, 8, 8), reduction=2, epochs=30)
VECTORS = Recipe()
# Perplexity is that of the plain cross-entropy, which this softness changes in the sixth digit.
TEXT = replace(VECTORS, softness=1e-6, stage_cost=0.0, batch_size=8)
TABLE = replace(VECTORS, batch_size=16)
BY_PREFIX = {"npz": VECTORS, "text": TEXT, "table": TABLE}


def recipe_for(data: str, model: str | None = None, optimizer: str = "adamw") -> Recipe:
    """The default recipe of a data set, with a model of the user's or without.

    A name without an entry of its own gets the one for vectors (`npz:FILE`), for texts
    (`text:FILE`, `table:FILE`) or for images.
    """
    recipe = RECIPES.get(data)
    if recipe is None:
        recipe = replace(BY_PREFIX.get(data.partition(":")[0], IMAGES), data=data)
    if model is not None:  # usually trained already: few epochs, small steps
        recipe = replace(recipe.of_model(model), epochs=5, learning_rate=3e-4, weight_decay=0.05)
        if not data.startswith(("text:", "table:")):
            recipe = replace(recipe, batch_size=64)
    if optimizer == "sgd":  # whose figures are of another size
        rate = 0.1 if model is None else 0.01
        recipe = replace(recipe, optimizer="sgd", learning_rate=rate, weight_decay=5e-4)
    return recipe
