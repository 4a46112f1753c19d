"""``gptlab.report``: run directories as one HTML page, written to a file or served live. Imports no torch.

``reading`` reads a run, ``document`` gathers all that the page shows, ``page`` renders it and ``live`` serves it.
"""
