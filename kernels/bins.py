"""What is counted together: plain numbers, for kernels and their twins."""

# Scores.
BIN_WIDTH = 0.25  # nats
NUM_BINS = 48  # down to a path log-probability of -12
# Keeps candidates of a flat stretch in their proposer's order.
SLOPE = 1e-3
# Of a path: nobody else proposes anything; others do, but not this; others do.
NUM_COMPANIES = 3
# Children by rank: the first, ..., and those from the ninth on together.
NUM_RANKS = 9
