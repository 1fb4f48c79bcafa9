"""Many runs from one command, and what is made of them.

Their numbers as one long table, statistics over seeds, tables, figures and a page.
"""
