"""Reading past runs and sweeps. Imports no torch."""
