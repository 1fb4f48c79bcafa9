"""Hypernetworks: functions from a condition to a parameter tree, and their layouts."""
