"""Reports: runs and sweeps as one HTML page, written once or followed as they go. Imports no torch."""
