"""Broken input: files that are not what they should be, each of which must work as meant or be refused by name.

    make torture ONLY=broken        tens of thousands of cases: records, recipes, pictures, wrecks of runs, models

A case is broken on purpose from something good, by a draw that its number and the seed repeat. It ends in one of two
ways: it works, and an independent reading of the same file agrees with what was read; or it is a `UserError`, one line
that says what and where. Everything else is lost: another exception, a difference, a hang, a memory that grows, a file
opened that was not named, a program started, a connection.

    trial.py      one case: how it ended, and whether that is allowed
    watch.py      which files were opened meanwhile
    mangle.py     how things break: bytes, tokens, structure
    records.py  recipes.py  pictures.py  wrecks.py  models.py      what is broken, and who says what it should be
    commands.py   a sample of that through the command line
    gallery.py  names.py      pictures, and what lies beside them
"""

# Of all cases: by what a case takes, and how many ways there are to break it.
SHARES = {"records": 0.3, "recipes": 0.45, "pictures": 0.23, "models": 0.01, "wrecks": 0.008, "commands": 0.002}
