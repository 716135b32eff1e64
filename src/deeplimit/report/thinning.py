"""Fewer points in a picture, so that a page stays light whatever the network's depth."""

from dataclasses import replace

from deeplimit.control.projection import TrajectoryPicture

MOST_POINTS = 40_000  # over all layers; about 0.7 MB of the page


def thin(picture: TrajectoryPicture, most: int = MOST_POINTS) -> TrajectoryPicture:
    """Evenly picked samples, class by class in turn, so that samples × layers stays under `most`.

    A picture that is small enough is returned as it is.
    """
    samples = len(picture.labels)
    wanted = max(1, most // len(picture.points))
    if samples <= wanted:
        return picture
    by_class = sorted(range(samples), key=lambda i: picture.labels[i])
    kept = sorted(by_class[i * samples // wanted] for i in range(wanted))
    return replace(
        picture,
        points=tuple(tuple(layer[i] for i in kept) for layer in picture.points),
        labels=tuple(picture.labels[i] for i in kept),
    )
