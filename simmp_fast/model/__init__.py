"""The network and its parts."""

from .dmwla import DMWLABlock
from .dsgim import DSGIM
from .memory import MemoryBank
from .simmpnet import SimMPNet
from .wld import UpdateWidth

__all__ = ["DSGIM", "DMWLABlock", "MemoryBank", "SimMPNet", "UpdateWidth"]
