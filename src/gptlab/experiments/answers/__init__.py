"""What a sweep has shown, with its uncertainty: comparisons over seeds, scaling laws. Imports no torch, no Hydra."""
