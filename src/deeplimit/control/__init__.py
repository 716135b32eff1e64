"""Training as optimal control: stage cost, dissipativity, turnpike, crop."""

from deeplimit.control.bridge import Bridge, bridge_of
from deeplimit.control.choosing import choose_cut
from deeplimit.control.crop_report import CropReport
from deeplimit.control.cropping import crop, removal, verify_crop
from deeplimit.control.cut_choice import CutChoice
from deeplimit.control.dissipativity import DissipativityReport, dissipativity
from deeplimit.control.distillation import Distillation
from deeplimit.control.fading import Fading
from deeplimit.control.projection import TrajectoryPicture, picture_trajectories
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy
from deeplimit.control.stage_cost import StageCost
from deeplimit.control.turnpike import TurnpikeProfile, turnpike_profile
from deeplimit.control.verdict import Verdict

__all__ = [
    "Bridge",
    "CropReport",
    "CutChoice",
    "DissipativityReport",
    "Distillation",
    "Fading",
    "SoftCrossEntropy",
    "StageCost",
    "TrajectoryPicture",
    "TurnpikeProfile",
    "Verdict",
    "bridge_of",
    "choose_cut",
    "crop",
    "dissipativity",
    "picture_trajectories",
    "removal",
    "turnpike_profile",
    "verify_crop",
]
