"""``gptlab.report``: run directories as one HTML page, written to a file or served live. Imports no torch.

``reading`` reads a run, ``document`` collects the page's data, ``page`` renders it and ``live`` serves it.
"""
