"""The comparison harness: every way to run a model on this machine, timed and judged side by side.

peer.py says what a contender is and what it is given; peers/ holds one file for each; worker.py is the process that one
lives in; harness.py runs the rounds, statistics.py judges them. Sits on runtime; nothing but commands/ sits on it.
"""
