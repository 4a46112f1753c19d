"""Lightning callbacks: metrics, checkpoints, samples, preemption, and checks of each step; one concern a file."""
