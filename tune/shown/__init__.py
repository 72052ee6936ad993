"""How a sweep is shown: on the terminal while it runs, and in the table and pictures that it leaves."""
