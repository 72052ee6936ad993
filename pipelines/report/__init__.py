"""The report of a data set: one page and its figures.

In: a manifest and the summaries of the ranges. Out: `report/report.html` and PNGs, the same bytes each time. May know:
matplotlib, dataset, preparation; not Beam.
"""
