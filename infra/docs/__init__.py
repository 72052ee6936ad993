"""The site of the documentation: `make docs`.

In: the Markdown files of the checkout where they lie, and the guides beside this file. Out: `site/`. May know: mkdocs.
"""
