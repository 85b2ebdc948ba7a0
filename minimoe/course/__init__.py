"""What the notebooks are made with: figures that can be read out, checks that name the mistake, exercises, the lint.

>>> from minimoe.course import show
"""
from minimoe.course.checking import CheckFailed, Report
from minimoe.course.show import show

__all__ = ["CheckFailed", "Report", "show"]
