"""Thin pieces in the form that other libraries ask for."""
