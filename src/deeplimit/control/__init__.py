"""Training as optimal control: stage cost, dissipativity, turnpike, crop."""

from typing import TYPE_CHECKING

from deeplimit.extras import lazy

if TYPE_CHECKING:
    from deeplimit.control.bridge import Bridge, bridge_of
    from deeplimit.control.choosing import choose_cut
    from deeplimit.control.control_cost import control_norms, vanished
    from deeplimit.control.cropping import CutChoice, Fading, crop, layers_to_remove
    from deeplimit.control.depth_table import DepthCosts, DepthTable, every_depth
    from deeplimit.control.distillation import Distillation
    from deeplimit.control.early_exit import EarlyExit, at_depth
    from deeplimit.control.exit_choice import ExitChoice, exit_depths
    from deeplimit.control.soft_cross_entropy import SoftCrossEntropy
    from deeplimit.control.stage_cost import StageCost
    from deeplimit.control.trajectories import (
        DissipativityReport,
        TrajectoryPicture,
        dissipativity,
        picture_trajectories,
    )
    from deeplimit.control.turnpike import TurnpikeProfile, turnpike_profile
    from deeplimit.control.verdict import Verdict
    from deeplimit.control.verifying import CropResult, verify_crop

__all__ = [
    "Bridge",
    "CropResult",
    "CutChoice",
    "DepthCosts",
    "DepthTable",
    "DissipativityReport",
    "Distillation",
    "EarlyExit",
    "ExitChoice",
    "Fading",
    "SoftCrossEntropy",
    "StageCost",
    "TrajectoryPicture",
    "TurnpikeProfile",
    "Verdict",
    "at_depth",
    "bridge_of",
    "choose_cut",
    "control_norms",
    "crop",
    "dissipativity",
    "every_depth",
    "exit_depths",
    "layers_to_remove",
    "picture_trajectories",
    "turnpike_profile",
    "vanished",
    "verify_crop",
]

__getattr__, __dir__ = lazy(__name__, {"CropReport": "CropResult", "removal": "layers_to_remove"})
