"""How voices are mixed, and how fast they learn: plain numbers, for kernels and their
twins."""

MAX_LOG_ODDS = 12.0  # no evidence here tells a surer proposer apart
PRIOR_CURVATURE = 1.0  # how firmly a voice is held to its first correction
MEMORY = 4096.0  # children per voice that are remembered, older ones fade
MAX_CHANGE = 0.5  # of a slope or offset in one step
# Of a voice in a row: children, then errors in slope and in offset, then what the loss
# is bent in slope, in both and in offset.
NUM_SUMS = 6
NUM_REMEMBERED = 4  # children and the three bends
