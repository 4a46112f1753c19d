"""What a run will need, before it runs: memory, time, disk, traffic. Imports no torch."""
