"""Products of many rows with matrices of weights on Hopper, for the ops of experts and linears."""
