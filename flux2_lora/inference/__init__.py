"""Sampling and editing with a base and its adapters, and the grids that show it."""
