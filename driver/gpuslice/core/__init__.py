"""The pure core: facts in, decisions out; no I/O, clock, threads, logging or randomness (import contract)."""
