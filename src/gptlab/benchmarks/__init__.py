"""``gptlab.bench``: speed as ratios of alternating runs."""
