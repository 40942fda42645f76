"""DR-RL: low-rank attention whose rank a policy, or a rule, chooses as the text runs."""

from foveate.methods.drrl.layer import DRRLLayer
from foveate.methods.drrl.memory import DRRLState
from foveate.methods.drrl.method import DRRL

__all__ = ["DRRL", "DRRLLayer", "DRRLState"]
