"""The tables of docs/reference/, made from the code.

Names, types, defaults and which device has what come from the code. Meanings and examples, which only a person can write,
stand here, by name. A name that only one side has is an error, so neither side becomes outdated.
"""
