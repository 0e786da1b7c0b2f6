"""The long form: see the package's docstring."""

import itertools
import random
import sys
import tempfile
from pathlib import Path

from slow.attacks import hosts, outcomes
from slow.attacks.hosts import cases
from slow.attacks.hosts.network import why_not


def drawn(seed: int):
    """Cases without end: kind, what is done, with what."""
    draw = random.Random(seed)
    for turn in itertools.count():
        for kind, moments in cases.MOMENTS.items():
            for count in (2, 3):
                victim = draw.choice(cases.HOSTS[:count])
                how = {"inside": draw.random() < 0.5, "head": draw.choice(cases.HOSTS[:count])}
                yield f"link cut {kind}, {count} hosts", cases.cut, (count, victim, draw.choice(moments)), how
        for processes in (False, True):
            count, moment = draw.choice((2, 3)), draw.choice(cases.MOMENTS["in a step"] + cases.MOMENTS["while saving"])
            victim = cases.HOSTS[(turn + processes) % 2]
            yield "host vanished and back", cases.vanish, (count, victim, moment), {"processes": processes}
        count = draw.choice((2, 3))
        yield "slow", cases.slow, (count, draw.choice(cases.HOSTS[:count]), draw.uniform(0.001, 0.02), 0.03), {}
        yield "late", cases.late, (count, draw.choice(cases.HOSTS[:count])), {}
        yield "another clock", cases.clock, (2, draw.choice(cases.HOSTS[:2]), draw.choice((-1e6, 1e6))), {}
        yield "another number of threads", cases.threads, (), {}
        if turn == 0:
            yield "a port that is taken", cases.taken, (), {}
            yield "another package", cases.other_package, (), {}
            yield "other data", cases.other_data, (), {}
            yield "another base in 4 bits", cases.other_base, (), {}


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    parser = outcomes.parser(hosts.__doc__, count=40)
    parser.add_argument("--only", default="", help="part of the name of a kind")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        attack = cases.Attack(Path(folder))
        every = (case for case in drawn(asked.seed) if asked.only in case[0])
        for kind, case, given, how in itertools.islice(every, asked.count):
            before = len(attack.failures)
            attack.go(kind, case, *given, **how)
            outcomes.say(attack.failures[-1] if len(attack.failures) > before else f"{kind}: {given} {how}")
    wrong = {kind: attack.wrong[kind] for kind in ("lost", "silent")}
    sys.exit(outcomes.write(asked.out, dict(sorted(attack.tried.items())), attack.failures, **wrong))
