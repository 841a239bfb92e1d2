"""The tables of docs/reference/, made from the code.

What the code knows (names, types, defaults, who has what) is read from the code. What only a person can say (a meaning,
an example) stands here, by name: a name that one side has and the other has not is an error, so neither gets old.
"""
