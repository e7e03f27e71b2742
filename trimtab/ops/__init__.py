"""The formulas of reinforcement learning from human feedback, as pure functions of tensors.

Nothing here knows of a config, a device, a file, a global or a random number. Every function returns what its
docstring's equation says, in the dtype it was given (float64 stays exact). Losses come back unreduced; `reduction`
holds the weights.
"""
