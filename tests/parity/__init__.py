"""Comparisons with numbers that published code computed; one module a family, run by pytest and by ``check.py``."""
