"""LeNets as people publish them, written anew from descriptions: what `accelerate` fuses, and how they are trained.

Every class is spelled as its model's authors spell theirs, habits included: `x.view(-1, 320)`, `Variable`, layers that
forward makes anew, dropout that is never switched off. None is a copy. `LENETS` has them by name.
"""

from . import adaptation, federated, libraries, pytorch, repositories, research  # noqa: F401 (they fill LENETS)
from .entry import LENETS, PublicLeNet, Scores

__all__ = ["LENETS", "PublicLeNet", "Scores"]
