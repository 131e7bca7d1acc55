"""The paper's numbers as data, one file for each table or figure, and ours beside them.

A file has the paper's numbers, a function that makes our own, and one that renders both as Markdown. `markdown`
writes a rendered table into a document.
"""
