"""`scale` on several hosts, whose network and whose processes fail.

    make torture ONLY=hosts        40 cases: links that are cut, slow or late, hosts that vanish, hosts that differ

The hosts are made of namespaces (network.py), and on each runs what a user starts there (scale/launch/torchrun.sh).
When a link is cut or a host vanishes, at any moment, every rank must end a few seconds after `scale.timeout`, and it
must be said which rank on which host does not answer. The same command afterwards must end with the same files as an
undisturbed run, bit for bit. Hosts with other data, another base model or another version of the package must be
refused in one line.
"""
