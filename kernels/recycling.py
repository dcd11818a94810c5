"""What the table of successors is made of: plain numbers, for kernels and their twins."""

NONE = -1  # no token, no owner
# Both measured on the bundled target's reading of Python that it was not trained on:
# accepted tokens change by 2% from 0.3 to 0.6 of the former, and by 1% from 0.3 to 0.7
# of the latter.
RATE = 0.45  # of what a row holds, replaced when its context is met again
PICK_WEIGHT = (
    0.5  # of what is learned at a node, the picked token; logits tell the rest
)
LEAST_WEIGHT = 1e-9
MIX_BEFORE, MIX_TOKEN = 0x9E3779B1, 0x85EBCA6B  # odd, 32 bits: products fit 64

# How often a successor of a weight is right: rates per bin of the weight's logarithm.
BIN_WIDTH = 0.25  # nats
NUM_BINS = 48  # down to a log-probability of -12
# Keeps candidates of a flat stretch in their own order.
SLOPE = 1e-3
PRIOR_WEIGHT = 16.0  # candidates for which a weight is taken at its word
MEMORY = 4096.0  # candidates per bin that are remembered, older ones fade
LEAST_RATE = 1e-9
