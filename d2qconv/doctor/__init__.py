"""`doctor`: what a machine can do, what a package needs and what is wrong with it, whether a model can be taken."""
