"""The evaluating shell: questions -> hits -> answers -> report, on Ray Data."""
