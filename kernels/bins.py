"""What is counted together: plain numbers, for kernels and their twins."""

# Of a child: nobody else proposes another of its parent, or it; others do, but not
# this; others propose it, too.
NUM_COMPANIES = 3
# Children by rank: the first, ..., and those from the ninth on together.
NUM_RANKS = 9
