"""``gptlab.report``: HTML report of runs and sweeps, written to a file or served live. Imports no torch.

``reading`` reads runs, ``document`` collects the data of the page, ``page`` renders it and ``live`` serves it.
"""
