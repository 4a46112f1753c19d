"""Lightning callbacks: metrics, checkpoints, samples, preemption and checks of each step.

One concern per file. ``launch.train_run`` adds them in the order in which Lightning calls them.
"""
