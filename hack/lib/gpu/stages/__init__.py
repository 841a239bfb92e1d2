"""The stages of a run. Each is a function of a `Machine` and the `Results` of its stage."""
