"""Benchmarks of speed and memory on this machine.

A time in milliseconds says little about another machine, and not much about this one an hour later. The ratio of two
contestants that were timed in turns says something about both. So every benchmark brings its own yardsticks: what
people run today, and a floor that nobody can be faster than.
"""
