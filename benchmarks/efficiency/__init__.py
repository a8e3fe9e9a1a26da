"""The parts of the sample-efficiency benchmark: data, cached states, one training loop, the arms, rows of results."""
