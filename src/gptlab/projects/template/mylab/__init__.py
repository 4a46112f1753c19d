"""Components of the project, each of which is the _target_ of a file in conf/."""
