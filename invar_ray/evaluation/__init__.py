"""What is measured: retrieval and answer metrics, variance over environments, intervals, and the
report.
"""
