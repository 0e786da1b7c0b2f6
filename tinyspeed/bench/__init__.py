"""How fast and how large, on this machine: ratios, taken side by side, with the machine written beside them.

A time in milliseconds says little about another machine and not much about this one an hour later; a ratio of two
contestants timed in turns says something about both. So every benchmark here brings its own yardsticks: a floor, what
nobody can avoid, and what people run today.
"""
