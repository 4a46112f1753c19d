"""``gptlab.prove``: order, resume and equality of ranks, verified on the user's own configuration."""
