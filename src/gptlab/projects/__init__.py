"""Files of a user's own project: experiments written from the configurations of other programs. Imports no torch."""
