"""Training as optimal control: stage cost, dissipativity, turnpike, crop."""

from deeplimit.control.crop_report import CropReport
from deeplimit.control.cropping import crop, removal, verify_crop
from deeplimit.control.dissipativity import DissipativityReport, dissipativity
from deeplimit.control.fading import Faded, Fading, fading
from deeplimit.control.projection import TrajectoryPicture, picture_trajectories
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy
from deeplimit.control.stage_cost import StageCost
from deeplimit.control.turnpike import TurnpikeProfile, turnpike_profile

__all__ = [
    "CropReport",
    "DissipativityReport",
    "Faded",
    "Fading",
    "SoftCrossEntropy",
    "StageCost",
    "TrajectoryPicture",
    "TurnpikeProfile",
    "crop",
    "dissipativity",
    "fading",
    "picture_trajectories",
    "removal",
    "turnpike_profile",
    "verify_crop",
]
