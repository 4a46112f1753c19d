"""What W&B shows of runs, as code: workspaces, and sweeps of its own. Imports no torch."""
