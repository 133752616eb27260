"""The verdict as one offline HTML file, for people: to read on any screen, to print, to sign.

In: a verdict, the run. Out: the text of a page. It never loads anything from elsewhere.
"""

from convert.verifier.page.body import page

__all__ = ["page"]
