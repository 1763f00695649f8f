"""Losses of both stages as pure functions of tensors, and the masks and the gather that they need.

Shape legend of this folder: B local rows (questions), C candidate slots of the global batch, E
environments (rewrite x window), T tokens, V vocabulary, D embedding size, M size of the teacher's
vectors, W ranks.  Scores are cosines; temperatures tau divide them.  Logarithms are natural, so
losses are in nats.

On plain tensors, with the recipes' temperatures: ``invariance_loss(cosines).loss``, where cosines
are [B, E, C] and the positive of row i is candidate i.
"""

from invar_ray.losses.alignment import alignment_loss
from invar_ray.losses.answer import answer_loss
from invar_ray.losses.contrastive import contrastive_loss
from invar_ray.losses.invariance import invariance_loss

__all__ = ["alignment_loss", "answer_loss", "contrastive_loss", "invariance_loss"]
