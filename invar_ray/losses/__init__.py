"""Losses of both stages as pure functions of tensors, and the masks and the gather that they need.

Shape legend of this folder: B local rows (questions), C candidate slots of the global batch, E
environments (rewrite x window), T tokens, V vocabulary, D embedding size, M size of the teacher's
vectors, W ranks.  Scores are cosines; temperatures tau divide them.  Logarithms are natural, so
losses are in nats.
"""
