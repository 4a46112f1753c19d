"""Statistics of finished sweeps: comparisons with their uncertainty, scaling fits. Imports no torch."""
