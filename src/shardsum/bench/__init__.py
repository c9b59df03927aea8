"""Measuring: sides that do the same work, alternating in one run, as JSON lines with the machine they ran on."""
