"""Plots, tables and summaries of run folders, from their files alone."""
