"""Rollouts and answers: the sampler and the generators behind one seam."""
