from . import linear_act as linear_act
from .fitted import Fitted as Fitted
from .linear_act import LinearAct as LinearAct
