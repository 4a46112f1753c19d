"""The report of runs as one HTML page, and its live server. Imports no torch."""
