"""What runs are shown as: tables for a terminal, and pages with figures.

May import: `lab`. Begin with `comparison.py`, policies side by side.
"""
