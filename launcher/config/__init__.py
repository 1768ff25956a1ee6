"""Cluster profiles and the values that they hold."""
