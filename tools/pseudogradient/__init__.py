"""Pseudogradient analysis: measures, branches of a run, tables, figures and the study of K."""
