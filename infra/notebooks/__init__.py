"""Two notebooks, as scripts that are notebooks (jupytext, percent form): `make notebooks` writes them as `.ipynb`.

In: a data set, or nothing. Out: pictures and numbers on the screen. May know: slm_ray, matplotlib, numpy.
"""
