"""Selective fine-tuning for PEFT: train the weights that the data chooses.

Importing the package registers the tuner with PEFT.
"""

from peft_ird._registration import register
from peft_ird.adapter.targets import select_parameters
from peft_ird.config import IRDConfig
from peft_ird.layers.layer import IRDLayer
from peft_ird.model import IRDModel
from peft_ird.options import ignoring_base_mismatch
from peft_ird.search.evaluate import TrainerEvaluate
from peft_ird.search.halving import SuccessiveHalving
from peft_ird.search.outcome import Outcome
from peft_ird.search.result import SearchResult
from peft_ird.search.search import search
from peft_ird.selection.calibration import Calibration
from peft_ird.selection.selection import Selection

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "IRDConfig",
    "IRDModel",
    "Outcome",
    "SearchResult",
    "Selection",
    "SuccessiveHalving",
    "TrainerEvaluate",
    "ignoring_base_mismatch",
    "search",
    "select_parameters",
]

register(IRDConfig, IRDModel, IRDLayer)
