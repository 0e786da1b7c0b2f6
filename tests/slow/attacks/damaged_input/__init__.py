"""Damaged input: files that are not what they should be. Each must work as meant, or be refused by name.

    make torture ONLY=damaged_input        40,000 cases: records, recipes, pictures, models, run folders, commands

Each case damages something sound, by a random draw that its number and the seed repeat. It may end in two ways: it
works, and an independent reading of the same file agrees with what tinyspeed read; or it is a `UserError`, one line
that says what and where. Everything else is a failure: another exception, a difference, a hang, memory that grows, a
file opened that was not named, a program started, a network connection.

    cases.py        one case: how it ended, and whether that is allowed
    file_access.py  which files were opened meanwhile
    mutations.py    how files are damaged: their bytes, tokens or structure
    records.py  recipes.py  pictures.py  models.py  run_folders.py      what is damaged, and what it should be
    commands.py     a sample of all this on the command line
    image_files.py  file_names.py     pictures, and what may lie in their folder
"""

# Of all cases: by how long a case takes and in how many ways it can be damaged.
SHARES = {"records": 0.3, "recipes": 0.45, "pictures": 0.23, "models": 0.01, "run_folders": 0.008, "commands": 0.002}
